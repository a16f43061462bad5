"""The kernels compiled for lesser CPUs than this one, by FIDDLER_ISA, against float64."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import isa_path_job
import llvmlite.binding as llvm
import numpy as np
import pytest
from expert_layers import F32, reference, relative_error

from cpu_kernels.isa import LEVELS, VARIABLE, Isa, host_isa, isa_from_features

ROOT = Path(__file__).parents[2]
Outputs = dict[str, F32]


def unforced_isa() -> Isa:
    features = dict(llvm.get_host_cpu_features())
    return isa_from_features(platform.machine(), llvm.get_host_cpu_name(), features)


def can_run(level: str) -> bool:
    features = dict(llvm.get_host_cpu_features())
    try:
        isa_from_features(platform.machine(), "", features, level)
    except ValueError:
        return False
    return True


def run_level(level: str, path: Path) -> Outputs:
    folders = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(Path(isa_path_job.__file__)), str(path)],
        env=os.environ | {VARIABLE: level, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return isa_path_job.load(path)


@pytest.fixture(scope="module")
def by_level(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outputs]]:
    """Outputs of every level that this CPU can run; two are compiled at a time.

    This process itself runs one of them: forced to it, a CPU keeps all that it has for it.
    """
    mine, folder = host_isa().level, tmp_path_factory.mktemp("levels")
    others = [level for level in LEVELS if level != mine and can_run(level)]
    with ThreadPoolExecutor(2) as threads:
        tasks = {
            level: threads.submit(run_level, level, folder / f"{level}.npz") for level in others
        }
        yield {level: task.result() for level, task in tasks.items()} | {
            mine: isa_path_job.outputs()
        }


def outputs_of(by_level: dict[str, Outputs], level: str) -> Outputs:
    if level not in by_level:
        pytest.skip(f"this CPU cannot run {level}")
    return by_level[level]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_agrees_with_float64(by_level: dict[str, Outputs], level: str) -> None:
    outputs = outputs_of(by_level, level)
    for key, weights, step in isa_path_job.layers():
        limit = 1e-5 if weights.path.activations == "f32" else 2e-3  # see test_expert_accuracy.py
        assert relative_error(outputs[key], reference(weights, step)) < limit, key


@pytest.mark.parametrize("level", LEVELS)
def test_int8_sums_are_exact_at_every_level(by_level: dict[str, Outputs], level: str) -> None:
    """Whole numbers add up to the same everywhere; what is left is the rounding of float32.

    An element of act that lies between two codes by less than that could differ by one of them: in
    these layers none does.
    """
    outputs, mine = outputs_of(by_level, level), by_level[host_isa().level]
    for key in outputs:
        if "/int8" in key:
            wide = mine[key].astype(np.float64)
            assert relative_error(outputs[key], wide) < 1e-6, key


def test_a_level_that_this_cpu_lacks_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import cpu_kernels.isa"],
        env=os.environ | {VARIABLE: "avx9000", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{VARIABLE} must be one of plain, avx2, avxvnni, avx512" in done.stderr


def test_forcing_this_cpus_own_level_changes_nothing() -> None:
    unforced = unforced_isa()
    features = dict(llvm.get_host_cpu_features())
    forced = isa_from_features(platform.machine(), unforced.cpu, features, unforced.level)
    if unforced.level == "avx512":
        assert forced == unforced
    assert forced.level == unforced.level

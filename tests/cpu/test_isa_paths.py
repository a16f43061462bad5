"""The kernels compiled for lesser CPUs than this one, by FIDDLER_ISA, against float64."""

import functools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import isa_path_job
import llvmlite.binding as llvm
import numpy as np
import pytest
from expert_layers import F32, reference, relative_error

from cpu_kernels.isa import LEVELS, VARIABLE, host_isa, isa_from_features

ROOT = Path(__file__).parents[2]
ALL = isa_path_job.PATHS
# A path compiles for some five seconds. These have each way to multiply bytes; the slow tests have
# the rest. Row-major weights at 8 lanes are cut into the same tiles as at 4.
PATHS_OF_LEVEL = {
    "plain": ("bf16/f32", "w8g64/int8"),
    "avx2": ("w4g32z/int8", "w4g128/f32"),
    "avxvnni": ("w8g64/int8",),
}
# AVX-512 as it was first made. Its kernels must not get into the cache, which takes this CPU's.
WITHOUT_VNNI = """
import runpy, sys
from cpu_kernels import isa
isa.Isa.has_vnni = isa.Isa.has_bf16 = property(lambda self: False)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Products of two bf16 on a CPU that has them, though it would not choose them.
IN_PAIRS = """
import runpy, sys
from cpu_kernels import isa
isa.Isa.multiplies_pairs = property(lambda self: self.has_bf16)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
Outputs = dict[str, F32]


def can_run(level: str) -> bool:
    features = dict(llvm.get_host_cpu_features())
    try:
        isa_from_features(platform.machine(), "", features, level)
    except ValueError:
        return False
    return True


def run_job(names: tuple[str, ...], *prelude: str, **variables: str) -> Outputs:
    """Outputs of a process of its own."""
    folders = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.npz"
        done = subprocess.run(
            [sys.executable, *prelude, str(Path(isa_path_job.__file__)), str(path), *names],
            env=os.environ | {"PYTHONPATH": folders} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return isa_path_job.load(names, path)


def run_level(level: str, names: tuple[str, ...]) -> Outputs:
    return run_job(names, **{VARIABLE: level})


@functools.cache
def own_outputs() -> Outputs:
    """This process's level, the widest: forced to that, a CPU would keep all that it has."""
    return isa_path_job.outputs(ALL)


@pytest.fixture(scope="module")
def by_level() -> Iterator[dict[str, Future[Outputs]]]:
    """Outputs of the lesser levels that this CPU can run; two are compiled at a time."""
    others = [level for level in PATHS_OF_LEVEL if level != host_isa().level and can_run(level)]
    with ThreadPoolExecutor(2) as threads:
        yield {level: threads.submit(run_level, level, PATHS_OF_LEVEL[level]) for level in others}


def check(outputs: Outputs, names: tuple[str, ...]) -> None:
    """Against float64, and the sums of whole numbers against this process's.

    Those are exact everywhere; what is left is the rounding of float32. An element of act that lies
    between two codes by less than that could get either: in these layers none does.
    """
    for key, weights, step in isa_path_job.layers(names):
        limit = 1e-5 if weights.path.activations == "f32" else 2e-3  # see test_expert_accuracy.py
        assert relative_error(outputs[key], reference(weights, step)) < limit, key
        if weights.path.activations == "int8":
            own_TH = own_outputs()[key].astype(np.float64)
            assert relative_error(outputs[key], own_TH) < 1e-6, key


@pytest.mark.parametrize("level", LEVELS)
def test_agrees_with_float64_and_the_other_levels(
    by_level: dict[str, Future[Outputs]], level: str
) -> None:
    if level == host_isa().level:
        check(own_outputs(), ALL)
    elif level in by_level:
        check(by_level[level].result(), PATHS_OF_LEVEL[level])
    else:
        pytest.skip(f"this CPU cannot run {level}")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_all_paths_of_a_level(level: str) -> None:
    if not can_run(level):
        pytest.skip(f"this CPU cannot run {level}")
    check(run_level(level, ALL), ALL)


@pytest.mark.slow
def test_avx512_without_products_of_four_bytes(tmp_path: Path) -> None:
    if host_isa().level != "avx512":
        pytest.skip("this CPU cannot run avx512")
    check(run_job(ALL, "-c", WITHOUT_VNNI, NUMBA_CACHE_DIR=str(tmp_path)), ALL)


@pytest.mark.slow
def test_products_of_two_bf16(tmp_path: Path) -> None:
    if not host_isa().has_bf16:
        pytest.skip("this CPU cannot multiply two bf16")
    names = ("bf16/bf16",)
    outputs = run_job(names, "-c", IN_PAIRS, NUMBA_CACHE_DIR=str(tmp_path))
    for key, weights, step in isa_path_job.layers(names):
        assert relative_error(outputs[key], reference(weights, step)) < 4e-3, key


def test_an_unknown_level_is_refused_at_the_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import cpu_kernels.isa"],
        env=os.environ | {VARIABLE: "avx9000", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{VARIABLE} must be one of plain, avx2, avxvnni, avx512, not 'avx9000'." in done.stderr

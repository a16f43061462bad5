"""Processes that compile kernels: what they leave, that they may fail, and that they end."""

import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numba
import pytest
from numba.core import caching

from cpu_kernels import precompile as module
from cpu_kernels.compiled import _stage, entry, kernels
from cpu_kernels.expert_layer import stage_maker
from cpu_kernels.kernel_paths import PATHS
from cpu_kernels.lossless import PACKER, make_packer
from cpu_kernels.precompile import (
    NUMBERS,
    PACK,
    READ,
    TOUCH,
    WORKERS,
    precompile,
    precompiling,
    uncached,
)
from cpu_kernels.read_kernel import make_read_stage, make_touch_stage

CHEAPEST = "bf12/f32"  # 5 s


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For this process and its children, which optimise less: that takes them less time."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NUMBA_OPT", "1")
    return tmp_path


def test_what_children_compile_is_not_compiled_again(empty_cache: Path) -> None:
    assert uncached([CHEAPEST]) == [CHEAPEST]
    precompile([CHEAPEST, WORKERS])
    assert uncached([CHEAPEST, WORKERS]) == []
    number = NUMBERS[CHEAPEST]
    assert _stage.__wrapped__(stage_maker(PATHS[number]), number).cache_hits == 1
    assert sum(kernels.__wrapped__().worker_loop.stats.cache_hits.values()) == 1


def test_what_measures_memory_and_packs_is_compiled_by_children_too(empty_cache: Path) -> None:
    names = [READ, TOUCH, PACK]
    assert uncached(names) == names
    precompile(names)
    assert uncached(names) == []
    for make in (make_read_stage, make_touch_stage):
        assert _stage.__wrapped__(make).cache_hits == 1
    packer = entry.__wrapped__(make_packer, PACKER)
    assert sum(packer.stats.cache_hits.values()) == 1


def test_an_error_meanwhile_ends_the_children(monkeypatch: pytest.MonkeyPatch) -> None:
    children = []

    def started(share: Sequence[str]) -> "subprocess.Popen[bytes]":
        children.append(subprocess.Popen(["sleep", "100"]))
        return children[-1]

    monkeypatch.setattr(module, "_started", started)
    with pytest.raises(RuntimeError, match="meanwhile"), precompiling(["a", "b"]):
        assert len(children) > 0 and all(child.poll() is None for child in children)
        raise RuntimeError("meanwhile")
    assert all(child.wait(10) == -9 for child in children)


def test_a_child_that_fails_is_harmless(empty_cache: Path) -> None:
    precompile(["no kernel"])
    assert uncached([CHEAPEST]) == [CHEAPEST]


def test_processes_that_cannot_be_started_are_harmless(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(empty_cache / "none"))
    precompile([CHEAPEST])
    assert uncached([CHEAPEST]) == [CHEAPEST]


def test_nothing_is_worth_compiling_where_no_cache_can_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert uncached([CHEAPEST, WORKERS]) == []


class Sleeper(subprocess.Popen[bytes]):
    """A process that is interrupted when it is waited for."""

    def wait(self, timeout: float | None = None) -> int:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("names", "shares"), [("", []), ("a", ["a"]), ("abc", ["ac", "b"])])
def test_a_core_has_one_child_at_most_and_an_interrupt_ends_them(
    names: str, shares: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    children: dict[str, Sleeper] = {}

    def started(share: Sequence[str]) -> Sleeper:
        return children.setdefault("".join(share), Sleeper(["sleep", "100"]))

    monkeypatch.setattr(module, "_started", started)
    monkeypatch.setattr(module, "num_cores", lambda machine: 2)
    with pytest.raises(KeyboardInterrupt) if names else nullcontext():
        precompile(list(names))
    assert list(children) == shares
    assert all(subprocess.Popen.wait(child, 10) == -9 for child in children.values())

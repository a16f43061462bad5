"""Compilation: the cache is found again, its absence is survived, unknown types are refused."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numba
import pytest
from numba.core import caching

from cpu_kernels import compiled
from cpu_kernels.compiled import (
    _stage,
    compile_entry,
    compile_stage,
    kernels,
    source_hash,
    stage_address,
)

FRESH_PROCESS = """
from cpu_kernels.compiled import kernels, needs_compile
print(needs_compile())
kernels()
print(sum(kernels().worker_loop.stats.cache_hits.values()), needs_compile())
"""


def test_the_second_start_compiles_nothing() -> None:
    kernels()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FRESH_PROCESS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "1", "False"]


def double(number: int) -> int:
    return 2 * number


def store_double(job: int, phase: int, worker: int, num_workers: int) -> None:
    pass


def make_stage(first: int, second: str) -> Callable[[int, int, int, int], None]:
    def stage(job: int, phase: int, worker: int, num_workers: int) -> None:
        _ = first, second

    return stage


def test_a_stage_is_compiled_once_for_each_key() -> None:
    address = stage_address(make_stage, 3, "a")
    assert address == stage_address(make_stage, 3, "a") != 0
    assert len({address, stage_address(make_stage, 4, "a"), stage_address(make_stage, 3, "b")}) == 3


def test_a_stage_is_cached_by_key_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    for first, second, expected_hits in ((5, "a", 0), (5, "b", 0), (5, "a", 1)):
        _stage.cache_clear()
        assert _stage(make_stage, first, second).cache_hits == expected_hits
    monkeypatch.setattr(compiled, "source_hash", lambda: "edited")
    _stage.cache_clear()
    assert _stage(make_stage, 5, "a").cache_hits == 0
    assert all(
        source_hash() in path.name or "edited" in path.name for path in tmp_path.rglob("*.nb?")
    )


def test_an_entry_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    for expected_hits in (0, 1):
        entry = compile_entry(double, (numba.int64,))
        assert entry(21) == 42
        assert sum(entry.stats.cache_hits.values()) == expected_hits


def test_a_damaged_cache_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compile_entry(double, (numba.int64,))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(b"no pickle")
    assert compile_entry(double, (numba.int64,))(21) == 42


def test_works_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cache"):
        numba.njit(cache=True)(double)
    assert compile_entry(double, (numba.int64,))(21) == 42
    assert compile_stage(store_double).address

"""The number of workers: as many as read nearly as fast as any number, measured once."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels import thread_count
from cpu_kernels.isa import isa_from_features
from cpu_kernels.thread_count import (
    best_num_threads,
    cache_file,
    counts_to_try,
    fingerprint_of,
    load_count,
    measured_num_threads,
    store_count,
)
from cpu_kernels.threads import default_num_threads
from cpu_kernels.topology import num_cores, read_machine


@given(st.dictionaries(st.integers(1, 99), st.floats(1, 300), min_size=1))
def test_the_most_that_are_within_five_percent(rates: dict[int, float]) -> None:
    best = best_num_threads(rates, rates.__getitem__)
    top = max(rates.values())
    assert rates[best] >= 0.95 * top
    assert all(rate < 0.95 * top for count, rate in rates.items() if count > best)


@given(st.integers(1, 500))
def test_a_handful_of_counts(limit: int) -> None:
    counts = counts_to_try(limit)
    assert max(counts) == limit
    assert min(counts) >= 1
    assert len(counts) <= 6


def test_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(thread_count, "SECONDS", 0.05)
    count = measured_num_threads()
    assert 1 <= count <= default_num_threads(num_cores(read_machine()))
    assert cache_file() == tmp_path / "fiddler" / "cpu.json"

    def refuse(limit: int) -> int:
        raise AssertionError("measured again")

    monkeypatch.setattr(thread_count, "_measure", refuse)
    assert measured_num_threads() == count
    assert [path.name for path in cache_file().parent.iterdir()] == ["cpu.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": {"a": 1}, "num_threads": "2"}'])
def test_a_useless_file_is_no_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpu.json").write_text(text)
    assert load_count(tmp_path / "cpu.json", {"a": 1}) is None


def test_another_machine_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.json"
    store_count(path, {"a": 1}, 3)
    assert load_count(path, {"a": 1}) == 3
    assert load_count(path, {"a": 2}) is None
    assert json.loads(path.read_text())["num_threads"] == 3
    store_count(tmp_path / "new" / "cpu.json" / "below_a_file", {"a": 1}, 3)  # cannot be written


def test_a_lesser_level_that_is_forced_is_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other start has the key that files have from before there was this one."""
    features = dict.fromkeys(("avx2", "fma", "f16c", "avx512vl", "avx512vnni"), True)

    def fingerprint(forced: str | None) -> dict[str, object]:
        isa = isa_from_features("x86_64", "cascadelake", features, forced)
        monkeypatch.setattr(thread_count, "host_isa", lambda: isa)
        return fingerprint_of(read_machine())

    free = fingerprint(None)
    assert set(free) == {"cpu", "cpus", "cores", "nodes", "sources"}
    assert fingerprint("avxvnni") == free  # the best that this CPU has
    for level in ("avx2", "plain"):
        assert fingerprint(level) == free | {"FIDDLER_ISA": level}

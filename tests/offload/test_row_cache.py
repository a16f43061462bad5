"""What memory holds of experts that do not all fit, with reads that a test may hold up or fail."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.arena import Arena
from offload.disk_job import DiskJob, runs_of_tokens
from offload.row_cache import RowCache, give_back_pages

LAYER = 3


class Disk:
    """Notes what is read and what is let go; ``rows`` are those that hold an expert's weights."""

    def __init__(self, first: list[int]) -> None:
        self.rows = {(LAYER, e) for e in first}
        self.read_keys: list[tuple[int, int]] = []
        self.failing: set[int] = set()
        self.may_read = threading.Event()
        self.may_read.set()
        self.cache = RowCache([(LAYER, e) for e in first], self.let_go)

    def read(self, layer: int, expert: int) -> None:
        assert self.may_read.wait(10)
        self.read_keys.append((layer, expert))
        if expert in self.failing:
            raise OSError(f"no expert {expert}")
        self.rows.add((layer, expert))

    def let_go(self, layer: int, expert: int) -> None:
        self.rows.discard((layer, expert))

    def need(self, experts: list[int], layer: int = LAYER) -> int:
        """Number of reads."""
        before = len(self.read_keys)
        self.cache.begin(layer, experts)
        self.cache.finish()
        assert all((layer, e) in self.rows and (layer, e) in self.cache for e in experts)
        assert len(self.rows) <= self.cache.most
        return len(self.read_keys) - before


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk([0, 1, 2, 3])
    made.cache.read_with(made.read, ThreadPoolExecutor(2))
    yield made
    made.may_read.set()
    made.cache.close()


def test_what_was_not_needed_for_longest_goes(disk: Disk) -> None:
    assert disk.need([0, 3]) == 0
    assert disk.need([5]) == 1  # 1 goes
    assert disk.need([0, 2, 3, 5]) == 0
    assert disk.need([0], layer=7) == 1  # another expert than that of layer 3, which goes
    assert disk.need([1]) == 1
    assert disk.cache.num_read == 3
    assert disk.rows == {(7, 0), (LAYER, 1), (LAYER, 3), (LAYER, 5)}


@given(st.lists(st.sets(st.integers(0, 9), max_size=4), max_size=20))
def test_the_experts_of_every_step_are_there(steps: list[set[int]]) -> None:
    disk = Disk([0, 1, 2, 3])
    disk.cache.read_with(disk.read, ThreadPoolExecutor(2))
    last_used = {0: 0, 1: 1, 2: 2, 3: 3}
    for step, experts in enumerate(steps, start=4):
        before = {e for _, e in disk.rows}
        assert disk.need(sorted(experts)) == len(experts - before)
        after = {e for _, e in disk.rows}
        kept = [last_used[e] for e in (before & after) - experts]
        assert all(last_used[e] <= min(kept, default=step) for e in before - after)
        last_used |= dict.fromkeys(sorted(experts), step)
    disk.cache.close()


def test_a_read_that_fails_is_told_and_leaves_the_row_free(disk: Disk) -> None:
    disk.failing = {6}
    disk.cache.begin(LAYER, [6, 7])
    with pytest.raises(OSError, match="no expert 6"):
        disk.cache.finish()
    assert (LAYER, 6) not in disk.cache and disk.rows == {(LAYER, e) for e in (2, 3, 7)}
    disk.failing = set()
    assert disk.need([6, 7, 2, 3]) == 1


def test_reads_of_an_abandoned_step_are_waited_for(disk: Disk) -> None:
    disk.may_read.clear()
    disk.cache.begin(LAYER, [8, 9])
    threading.Timer(0.05, disk.may_read.set).start()
    assert disk.need([8, 2, 3]) == 2  # 8 and 9 of before
    assert disk.rows == {(LAYER, e) for e in (2, 3, 8, 9)}


# --- steps that need more than is held ---


@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_runs_are_few_and_need_no_more_than_allowed(
    num_tokens: int, top_k: int, seed: int, more: int
) -> None:
    rng = np.random.default_rng(seed)
    ids_TK = np.stack([rng.permutation(8)[:top_k] for _ in range(num_tokens)]).astype(np.int32)
    is_cold_TK = rng.random(8)[ids_TK] < 0.7
    most = top_k + more
    runs = list(runs_of_tokens(ids_TK, is_cold_TK, most))
    assert [t for part, _ in runs for t in range(part.start, part.stop)] == list(range(num_tokens))
    wanted = [set(ids[cold].tolist()) for ids, cold in zip(ids_TK, is_cold_TK, strict=True)]
    for n, (part, experts) in enumerate(runs):
        assert set(experts) == set().union(*wanted[part]) and len(experts) <= most
        if n + 1 < len(runs):
            assert len(set(experts) | wanted[part.stop]) > most


def test_the_pool_is_given_one_run_after_the_other(disk: Disk) -> None:
    done: list[tuple[list[int], set[int]]] = []

    class Pool:
        def submit(self, layer: str, x: object, ids: np.ndarray, *_: object) -> None:
            assert layer == "the layer"
            assert all((LAYER, e) in disk.rows for e in ids.ravel().tolist())
            done.append((ids[:, 0].tolist(), {e for _, e in disk.rows}))

        def wait(self) -> None:
            done.append(([], set()))

    ids_TK = np.array([[0, 1], [4, 5], [1, 0], [6, 7]], np.int32)
    arrays = (np.zeros((4, 2)), ids_TK, np.zeros((4, 2)), np.zeros((4, 2)))
    job = DiskJob(disk.cache, LAYER, arrays, np.ones((4, 2), bool))
    job.submit(Pool(), "the layer")  # type: ignore[arg-type]
    assert [some for some, _ in done] == [[0, 4, 1], [], [6]]


# --- pages ---


def test_pages_go_back_and_neighbours_keep_theirs() -> None:
    arena = Arena(1 << 20)
    rows = torch.from_numpy(arena.array(np.uint8, (8, 1 << 17)))
    rows.fill_(7)
    give_back_pages(rows[3])
    assert (rows[3] == 0).all() and (rows[2] == 7).all() and (rows[4] == 7).all()
    small = rows[5, 100:3000]  # within a page
    give_back_pages(small)
    assert (rows[5] == 7).all()
    give_back_pages(rows[6, 10:])
    assert (rows[6, 10:4096] == 7).all() and (rows[6, 4096:] == 0).all() and (rows[7] == 7).all()

"""Policies against brute force, against naive models, and against the engine's own placement.

S steps, M layers, E experts, C choices.
"""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.adaptive_placement import AdaptivePlacement
from offload.policies import Adaptive, Lru, Oracle, Static, play
from tests.offload.swap_store import MOE_LAYERS, E, make_store


@st.composite
def small_traces(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """Steps ``[S, M, C]``, experts of a layer and slots in all."""
    layers, experts = draw(st.sampled_from([(1, 3), (1, 4), (2, 2), (2, 3)]))
    choices = draw(st.integers(1, 2))
    size = (draw(st.integers(1, 6)), layers, choices)
    count = size[0] * layers * choices
    ids = draw(st.lists(st.integers(0, experts - 1), min_size=count, max_size=count))
    return np.array(ids).reshape(size), experts, draw(st.integers(0, layers * experts))


def read_sets(steps: np.ndarray) -> list[frozenset[tuple[int, int]]]:
    """Of each step, the (layer, expert) that it reads."""
    return [
        frozenset((layer, int(e)) for layer, row in enumerate(ids) for e in row) for ids in steps
    ]


def most_hits(steps: np.ndarray, experts: int, num_slots: int) -> int:
    """The best of all ways to fill the slots: hits less copies that no read of a step asked for."""
    every = list(itertools.product(range(steps.shape[1]), range(experts)))
    states = [frozenset(c) for n in range(num_slots + 1) for c in itertools.combinations(every, n)]
    reads = read_sets(steps)

    @cache
    def best(step: int, before: frozenset[tuple[int, int]]) -> int:
        if step == len(reads):
            return 0
        hits = len(reads[step] & before)
        known = before | reads[step]
        return hits + max(best(step + 1, after) - len(after - known) for after in states)

    return max(best(0, state) for state in states)


@settings(max_examples=60, deadline=None)
@given(small_traces())
def test_no_way_to_fill_the_slots_beats_the_oracle(case: tuple[np.ndarray, int, int]) -> None:
    steps, experts, num_slots = case
    played = play(Oracle(steps, experts, num_slots), steps)
    assert played.reads_SM.sum(axis=1).tolist() == list(map(len, read_sets(steps)))
    assert played.hits_SM.sum() == most_hits(steps, experts, num_slots)


def naive_lru(steps: np.ndarray, slots: list[int], start: list[list[int]]) -> list[tuple[int, int]]:
    """(hits, loads) of each step, with a list per layer, the latest last."""
    caches, found = [list(reversed(row[:n])) for row, n in zip(start, slots, strict=True)], []
    for ids in steps.tolist():
        hits = loads = 0
        for cache_, row, room in zip(caches, ids, slots, strict=True):
            hits += len(set(row) & set(cache_))
            loads += len(set(row) - set(cache_))
            for expert in sorted(set(row), reverse=True):
                if expert in cache_:
                    cache_.remove(expert)
                cache_.append(expert)
            del cache_[: max(0, len(cache_) - room)]
        found.append((hits, loads))
    return found


@given(small_traces(), st.data())
def test_lru_is_a_list(case: tuple[np.ndarray, int, int], data: st.DataObject) -> None:
    steps, experts, _ = case
    rows = steps.shape[1]
    slots = data.draw(st.lists(st.integers(0, experts), min_size=rows, max_size=rows))
    counts = np.array([data.draw(st.permutations(range(experts))) for _ in range(rows)])
    start = np.argsort(-counts, axis=1).tolist()
    played = play(Lru(np.array(slots), counts), steps)
    hits_S, loads_S = (
        count_SM.sum(axis=1).tolist() for count_SM in (played.hits_SM, played.loaded_SM)
    )
    assert list(zip(hits_S, loads_S, strict=True)) == naive_lru(steps, slots, start)


@given(st.integers(0, 2**20), st.integers(1, 40))
def test_nobody_beats_the_oracle_on_longer_traces(seed: int, num_slots: int) -> None:
    rng = np.random.default_rng(seed)
    rows, experts = 3, 16
    weights = rng.exponential(1, (30, rows, experts)) ** 2
    steps = np.argsort(-weights, axis=2)[:, :, :3]
    best = play(Oracle(steps, experts, num_slots), steps).hits_SM.sum()
    counts = rng.integers(0, 9, (rows, experts))
    is_resident = rng.permutation(rows * experts).reshape(rows, experts) < num_slots
    even = num_slots // rows + (np.arange(rows) < num_slots % rows)
    for policy in (Static(is_resident), Lru(even, counts)):
        assert play(policy, steps).hits_SM.sum() <= best
    fewer = rng.permutation(rows * experts).reshape(rows, experts) < max(0, num_slots - rows)
    played = play(Adaptive(fewer, 1), steps)
    assert played.hits_SM.sum() - played.moved_S.sum() <= best


def test_what_stays_is_counted_by_hand() -> None:
    steps = np.array([[[0, 1, 1], [2, 2, 2]], [[3, 0, 2], [0, 1, 2]]])
    is_resident = np.array([[1, 0, 0, 0], [0, 0, 1, 1]], bool)
    played = play(Static(is_resident), steps)
    assert played.reads_SM.tolist() == [[2, 1], [3, 3]]
    assert played.hits_SM.tolist() == [[1, 1], [1, 1]]
    assert not played.loaded_SM.any() and not played.moved_S.any()


@pytest.mark.parametrize("seed", range(4))
def test_adaptive_is_what_the_engine_does(seed: int) -> None:
    """The same residents before every step as a real store has, with its own tables and copies."""
    rng = np.random.default_rng(seed)
    resident = [set(rng.permutation(E)[:n].tolist()) for n in (2, 4, 1)]
    store = make_store(torch.device("cpu"), *resident)
    engine = AdaptivePlacement(store, torch.device("cpu"))
    mine = Adaptive(store.is_resident_LE()[list(MOE_LAYERS)], store.expert_bytes(MOE_LAYERS[0]))
    hot = np.array([rng.permutation(E) for _ in MOE_LAYERS])
    num_moved = 0
    for step in range(400):
        if step % 150 == 149:
            hot = rng.permuted(hot, axis=1)
        ids_MC = np.take_along_axis(hot, rng.geometric(0.5, (3, 4)).clip(max=E) - 1, axis=1)
        engine.move()
        is_resident_ME = store.is_resident_LE()[list(MOE_LAYERS)]
        engine.count(MOE_LAYERS, ids_MC[:, :, None])
        outcome = mine.step(ids_MC)
        wanted = sum(len({e for e in row if is_resident_ME[m, e]}) for m, row in enumerate(ids_MC))
        assert outcome.hits_M.sum() == wanted, step
        num_moved += outcome.moved
    assert engine.num_swaps > 3
    assert num_moved in (2 * engine.num_swaps, 2 * engine.num_swaps - 1, 2 * engine.num_swaps - 2)

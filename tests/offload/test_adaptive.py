"""Choosing swaps: the rules one by one, and hit rates on routing that drifts.

S steps, L layers, E experts, K choices, R residents of a layer.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.adaptive import COPY_SHARE, LINK_SHARE, CopyBudget, Heat, Swap, choose_swaps

L, E, K, R = 6, 64, 8, 21
BYTES = 100


def test_heat_decays() -> None:
    heat = Heat(3, 4, decay=0.5)
    heat.count([0, 2], np.array([[1, 1, 3], [0, 2, 2]]))
    heat.count([0, 2], np.array([[1, 0, 0], [3, 3, 3]]))
    assert heat.heat_LE.tolist() == [[2, 2, 0, 0.5], [0, 0, 0, 0], [0.5, 0, 1, 3]]


def test_the_largest_gains_come_first() -> None:
    heat_LE = np.array([[9.0, 1, 5, 0], [20, 0, 3, 8], [7, 6, 0, 0]])
    is_resident_LE = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]], bool)
    wanted = [Swap(1, 0, 1), Swap(0, 0, 1), Swap(2, 0, 3)]
    assert choose_swaps(heat_LE, is_resident_LE, [2, 0, 1], 9, margin=3) == wanted
    assert choose_swaps(heat_LE, is_resident_LE, [0, 1, 2], 2, margin=3) == wanted[:2]
    # 9 and 1 are 3.6 standard errors apart, 7 and 0 are 3.7
    assert choose_swaps(heat_LE, is_resident_LE, [0, 2], 9, margin=3.7) == wanted[2:]
    assert choose_swaps(heat_LE, is_resident_LE, [0, 1, 2], 0) == []
    assert choose_swaps(heat_LE, is_resident_LE, [], 9) == []


@given(st.integers(0, 2**20), st.floats(0, 10))
def test_every_swap_is_a_gain(seed: int, margin: float) -> None:
    rng = np.random.default_rng(seed)
    heat_LE = rng.exponential(5, (L, E)).round()
    is_resident_LE = rng.permuted(np.arange(E)[None].repeat(L, 0) < R, axis=1)
    swaps = choose_swaps(heat_LE, is_resident_LE, range(L), L, margin)
    assert len({swap.layer for swap in swaps}) == len(swaps)
    for swap in swaps:
        heat_E, is_resident_E = heat_LE[swap.layer], is_resident_LE[swap.layer]
        assert is_resident_E[swap.leaves] and not is_resident_E[swap.comes]
        assert heat_E[swap.comes] == heat_E[~is_resident_E].max()
        assert heat_E[swap.leaves] == heat_E[is_resident_E].min()
        comes, leaves = heat_E[swap.comes], heat_E[swap.leaves]
        assert comes - leaves > margin * ((comes + leaves) / 2) ** 0.5


@settings(max_examples=50)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=60))
def test_no_more_is_spent_than_earned(cold: list[int]) -> None:
    budget, earned, spent = CopyBudget(BYTES), 0.0, 0
    for num_cold in cold:
        budget.earn(num_cold)
        earned += COPY_SHARE * LINK_SHARE * num_cold * BYTES
        count = budget.num_swaps
        budget.spend(count)
        spent += 2 * BYTES * count
        assert spent <= earned + 1e-6


@pytest.mark.parametrize(("share", "most"), [(0.001, 1), (0.1, 12)])
def test_what_is_not_spent_is_not_hoarded(share: float, most: int) -> None:
    budget = CopyBudget(BYTES, share)
    for _ in range(1000):
        budget.earn(240)
    assert budget.num_swaps == most


@pytest.mark.parametrize("batch", [1, 4])
def test_chance_alone_moves_next_to_nothing(batch: int) -> None:
    """However many tokens a step has: heat's spread grows with it."""
    rng = np.random.default_rng(batch)
    steps, layers, experts = 1000, 4, 128
    is_resident_LE = np.arange(experts)[None].repeat(layers, 0) % 3 == 0
    heat, swaps = Heat(layers, experts), []
    for _ in range(steps):
        ids_LBE = rng.random((layers, batch, experts)).argsort(axis=2)[:, :, :8]
        heat.count(range(layers), ids_LBE.reshape(layers, -1))
        chosen = choose_swaps(heat.heat_LE, is_resident_LE, range(layers), layers)
        for swap in chosen:
            is_resident_LE[swap.layer, [swap.comes, swap.leaves]] = True, False
        swaps += chosen
    print(f"{len(swaps)} swaps")
    assert len(swaps) < steps * layers / 50


def drifting(seed: int, steps: int, memory: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids ``[S, L, K]``, and the long run's favourites: skewed for ever, and by what is spoken of.

    ``memory``: steps after which the subject has changed; 0: there is none.
    """
    rng = np.random.default_rng(seed)
    base_LE = rng.permuted(np.log(1 / np.arange(1, E + 1))[None].repeat(L, 0), axis=1)
    keep = np.exp(-1 / memory) if memory else 0.0
    subject_LE = rng.standard_normal((L, E))
    ids = []
    for _ in range(steps):
        subject_LE = keep * subject_LE + (1 - keep**2) ** 0.5 * rng.standard_normal((L, E))
        score_LE = base_LE + 1.5 * subject_LE * bool(memory) + rng.gumbel(size=(L, E))
        ids.append(np.argsort(-score_LE, axis=1)[:, :K])
    return np.stack(ids), base_LE


def static_hits(ids_SLK: np.ndarray, is_resident_LE: np.ndarray) -> float:
    return float(is_resident_LE[np.arange(L)[None, :, None], ids_SLK].mean())


def lru_hits(ids_SLK: np.ndarray, is_resident_LE: np.ndarray) -> tuple[float, int]:
    """Hit rate and experts copied of a cache that takes every miss."""
    hits = copies = 0
    for layer in range(L):
        used = {int(e): -1 for e in np.flatnonzero(is_resident_LE[layer])}
        for step, ids_K in enumerate(ids_SLK[:, layer]):
            for expert in ids_K.tolist():
                hits += expert in used
                if expert not in used:
                    del used[min(used, key=lambda e: used[e])]
                    copies += 1
                used[expert] = step
    return hits / ids_SLK.size, copies


def adaptive_hits(ids_SLK: np.ndarray, is_resident_LE: np.ndarray) -> tuple[float, int]:
    """As it runs: a swap takes a step to arrive and one to leave; the share of copies is kept."""
    resident_LE, heat, budget = is_resident_LE.copy(), Heat(L, E), CopyBudget(BYTES)
    hits = copies = 0
    moving: list[Swap] = []
    for ids_LK in ids_SLK:
        is_hit_LK = resident_LE[np.arange(L)[:, None], ids_LK]
        hits += int(is_hit_LK.sum())
        heat.count(range(L), ids_LK)
        budget.earn(int((~is_hit_LK).sum()))
        for swap in moving:
            resident_LE[swap.layer, [swap.comes, swap.leaves]] = True, False
        moving = choose_swaps(heat.heat_LE, resident_LE, range(L), budget.num_swaps)
        budget.spend(len(moving))
        copies += 2 * len(moving)
    return hits / ids_SLK.size, copies


@pytest.mark.parametrize("memory", [300, 1000])
def test_it_follows_what_is_spoken_of(memory: int) -> None:
    ids_SLK, base_LE = drifting(seed=memory, steps=1200, memory=memory)
    is_resident_LE = np.argsort(np.argsort(-base_LE, axis=1), axis=1) < R
    static = static_hits(ids_SLK, is_resident_LE)
    lru, lru_copies = lru_hits(ids_SLK, is_resident_LE)
    adaptive, copies = adaptive_hits(ids_SLK, is_resident_LE)
    print(f"static {static:.3f}, LRU {lru:.3f} ({lru_copies}), adaptive {adaptive:.3f} ({copies})")
    assert adaptive > static + 0.03
    assert adaptive > lru - 0.06 and copies < lru_copies / 30


def test_it_loses_little_where_nothing_drifts() -> None:
    ids_SLK, base_LE = drifting(seed=3, steps=800, memory=0)
    is_resident_LE = np.argsort(np.argsort(-base_LE, axis=1), axis=1) < R
    static = static_hits(ids_SLK, is_resident_LE)
    adaptive, _ = adaptive_hits(ids_SLK, is_resident_LE)
    print(f"static {static:.3f}, adaptive {adaptive:.3f}")
    assert adaptive > static - 0.01 and adaptive > lru_hits(ids_SLK, is_resident_LE)[0]

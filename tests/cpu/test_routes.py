"""Grouping of a step's choices by expert, and the workers' shares of it, against brute force."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.expert_job import JOB, ROOM, job_array
from cpu_kernels.packed_stage import total_cost
from cpu_kernels.routes import (
    READ_COST,
    make_routes,
    routed_experts,
    routed_pairs,
    share_of,
)
from cpu_kernels.scratch import routes_words

SENTINEL = -77
Compiled = Callable[[int, int], tuple[Any, ...]]


class Routes(NamedTuple):
    is_ok: bool
    places: list[int]
    starts: list[int]
    tokens: list[int]
    weights: list[float]


@pytest.fixture(scope="module")
def routes_of() -> Compiled:
    @numba.njit(error_model="numpy")
    def compiled(address, worker):  # type: ignore[no-untyped-def]
        job = job_array(address, 1)[0]
        is_ok = make_routes(job, worker)
        places, starts = routed_experts(job, worker)
        tokens, weights = routed_pairs(job, worker)
        return is_ok, places.copy(), starts.copy(), tokens.copy(), weights.copy()

    return compiled


def find_routes(
    routes_of: Compiled,
    ids_TS: npt.NDArray[np.int32],
    weights_TS: npt.NDArray[np.float32],
    num_experts: int,
    place_of: npt.NDArray[np.int32] | None = None,
    worker: int = 1,
) -> Routes:
    """What a worker makes of a step, in memory that held something before."""
    job = np.zeros(1, JOB)
    stride = ROOM.itemsize + 8 * routes_words(num_experts, ids_TS.size)
    room = np.full(3 * stride // 8, SENTINEL, np.int64)
    job["workers"], job["worker_stride"] = room.ctypes.data, stride
    job["ids"], job["weights"] = ids_TS.ctypes.data, weights_TS.ctypes.data
    job["num_tokens"], job["top_k"] = ids_TS.shape
    job["num_experts"] = job["num_ids"] = num_experts
    if place_of is not None:
        job["place_of"], job["num_ids"] = place_of.ctypes.data, len(place_of)
    is_ok, *arrays = routes_of(job.ctypes.data, worker)
    words = stride // 8
    assert (room[: worker * words] == SENTINEL).all()  # the others' is left alone
    assert (room[(worker + 1) * words :] == SENTINEL).all()
    places, starts, tokens, weights = (array.tolist() for array in arrays)
    num_routed = starts[-1]
    return Routes(is_ok, places, starts, tokens[:num_routed], weights[:num_routed])


def brute_force(
    ids_TS: npt.NDArray[np.int32], weights_TS: npt.NDArray[np.float32], place_of: list[int]
) -> Routes:
    places: list[int] = []
    starts, tokens, weights = [0], [], []
    for place in range(max(place_of, default=-1) + 1):
        for (token, slot), expert in np.ndenumerate(ids_TS):
            if expert >= 0 and place_of[expert] == place:
                tokens.append(token)
                weights.append(float(weights_TS[token, slot]))
        if len(tokens) > starts[-1]:
            places.append(place)
            starts.append(len(tokens))
    return Routes(True, places, starts, tokens, weights)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    num_experts=st.integers(1, 40),
    num_tokens=st.integers(0, 60),
    top_k=st.integers(0, 9),
    skew=st.floats(0.1, 4),
)
def test_routes_are_the_choices_by_expert(
    routes_of: Compiled, seed: int, num_experts: int, num_tokens: int, top_k: int, skew: float
) -> None:
    rng = np.random.default_rng(seed)
    raw_TS = (num_experts + 1) * rng.random((num_tokens, top_k)) ** skew  # few or many for low ids
    ids_TS = raw_TS.astype(np.int32) - np.int32(1)
    weights_TS = rng.random((num_tokens, top_k), np.float32)
    expected = brute_force(ids_TS, weights_TS, list(range(num_experts)))
    for worker in (0, 2):
        found = find_routes(routes_of, ids_TS, weights_TS, num_experts, worker=worker)
        assert found == expected


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32), num_ids=st.integers(1, 30), num_held=st.integers(0, 30))
def test_routes_of_experts_that_are_held(
    routes_of: Compiled, seed: int, num_ids: int, num_held: int
) -> None:
    rng = np.random.default_rng(seed)
    num_held = min(num_held, num_ids)
    place_of = np.full(num_ids, -1, np.int32)
    place_of[rng.permutation(num_ids)[:num_held]] = rng.permutation(num_held)
    ids_TS = rng.integers(-1, num_ids, (17, 4), np.int32)
    weights_TS = rng.random((17, 4), np.float32)
    found = find_routes(routes_of, ids_TS, weights_TS, num_held, place_of)
    assert found == brute_force(ids_TS, weights_TS, place_of.tolist())


@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [0, 6, 11])
def test_an_unknown_id_leaves_no_routes(routes_of: Compiled, bad: int, place: int) -> None:
    ids_TS = np.arange(12, dtype=np.int32).reshape(6, 2) % 5
    ids_TS.flat[place] = bad
    found = find_routes(routes_of, ids_TS, np.ones((6, 2), np.float32), 5)
    assert found == Routes(False, [], [0], [], [])


ROWS_OF_TILE = 16


@numba.njit
def cost_of(starts, kept, width):  # type: ignore[no-untyped-def]
    return total_cost(starts, kept, width, ROWS_OF_TILE)


def shares(
    counts: list[int], kept: int, width: int, num_workers: int
) -> list[list[tuple[int, int, int, int]]]:
    """Of each worker: (expert, first tile, last tile, cost)."""
    starts = np.cumsum([0, *counts])
    cost = cost_of(starts, kept, width)
    found = []
    for worker in range(num_workers):
        begin, end = cost * worker // num_workers, cost * (worker + 1) // num_workers
        before, mine = 0, []
        for n, (count, tiles) in enumerate(zip(counts, tiles_of(counts, kept, width), strict=True)):
            first, last, before = share_of.py_func(READ_COST + count, tiles, before, begin, end)
            mine.append((n, first, last, (last - first) * (READ_COST + count)))
        assert before == cost
        found.append(mine)
    return found


def tiles_of(counts: list[int], kept: int, width: int) -> list[int]:
    """Tiles of each expert, counted row by row."""
    return [
        len({row // ROWS_OF_TILE for row in range(width) if n * width + row < kept})
        for n in range(len(counts))
    ]


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(1, 600), max_size=20),
    width=st.integers(1, 3000),
    num_workers=st.integers(1, 40),
    data=st.data(),
)
def test_every_tile_is_in_one_share(
    counts: list[int], width: int, num_workers: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, width * len(counts)))
    tiles = tiles_of(counts, kept, width)
    visits = np.zeros((len(counts), max(tiles, default=0)), np.int64)
    for mine in shares(counts, kept, width, num_workers):
        for n, first, last, _ in mine:
            assert 0 <= first <= tiles[n] and 0 <= last <= tiles[n]
            visits[n, first:last] += 1
    assert visits.sum(1).tolist() == tiles and (visits <= 1).all()


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(1, 600), min_size=1, max_size=20),
    width=st.integers(1, 3000),
    num_workers=st.integers(1, 40),
    data=st.data(),
)
def test_shares_differ_by_a_tile_at_most(
    counts: list[int], width: int, num_workers: int, data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, width * len(counts)))
    found = shares(counts, kept, width, num_workers)
    costs = [sum(cost for *_, cost in mine) for mine in found]
    one_tile = READ_COST + max(counts)
    assert max(abs(cost - sum(costs) / num_workers) for cost in costs) <= one_tile + 1

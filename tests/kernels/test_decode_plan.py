"""The decode plan covers every token once and stays near the balanced step."""

import itertools
import time

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from gpu_kernels.decode_plan import MIN_CHUNK_TOKENS, DecodePlan, plan_decode

lengths = st.lists(st.integers(0, 40_000), min_size=1, max_size=70)


def covered(plan: DecodePlan, kv_lens: list[int]) -> list[list[tuple[int, int]]]:
    """Token ranges per request, in the order of the work items."""
    ranges: list[list[tuple[int, int]]] = [[] for _ in kv_lens]
    items = zip(plan.request_indices.tolist(), plan.kv_tile_indices.tolist(), strict=True)
    for request, tile in items:
        begin = tile * plan.chunk_size
        ranges[request].append((begin, min(begin + plan.chunk_size, kv_lens[request])))
    return ranges


@given(lengths, st.sampled_from([1, 2, 8]), st.sampled_from([1, 16]), st.integers(1, 600))
@example([0], 1, 16, 1)
def test_every_token_is_covered_once(
    kv_lens: list[int], num_kv_heads: int, page_size: int, max_programs: int
) -> None:
    plan = plan_decode(kv_lens, num_kv_heads, page_size=page_size, max_programs=max_programs)
    counts = np.diff(plan.o_indptr.numpy())
    assert plan.o_indptr[0] == 0 and counts.min() >= 1
    assert plan.request_indices.tolist() == np.repeat(np.arange(len(kv_lens)), counts).tolist()
    for kv_len, ranges in zip(kv_lens, covered(plan, kv_lens), strict=True):
        assert ranges[0][0] == 0 and ranges[-1][1] == kv_len
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
        assert kv_len == 0 or all(begin < end for begin, end in ranges)


@given(lengths, st.integers(1, 300))
@example([40_000] + [16] * 40, 30)
def test_step_is_within_two_chunks_of_balance(kv_lens: list[int], slots: int) -> None:
    plan = plan_decode(kv_lens, 1, page_size=16, max_programs=slots)
    mean = max(MIN_CHUNK_TOKENS, -(-sum(-(-n // 16) for n in kv_lens) // slots) * 16)
    assert MIN_CHUNK_TOKENS <= plan.chunk_size <= 2 * mean
    # splitting beyond one wave happens only where unsplit lengths are badly skewed
    assert plan.num_work <= max(slots, len(kv_lens)) or max(kv_lens) > 2 * mean


def test_full_batch_of_equal_lengths_is_not_split() -> None:
    assert not plan_decode([4096] * 66, 4, page_size=16, max_programs=264).is_split


def test_one_long_request_fills_the_device() -> None:
    plan = plan_decode([32_768], 4, page_size=16, max_programs=528)
    assert 120 <= plan.num_work <= 132


def test_planning_64_requests_takes_under_a_millisecond() -> None:
    kv_lens = (np.arange(64) * 517 % 32_000).tolist()
    best = min(_seconds(kv_lens) for _ in range(20))
    assert best < 1e-3


def _seconds(kv_lens: list[int]) -> float:
    start = time.perf_counter()
    plan_decode(kv_lens, 4, page_size=16, max_programs=528)
    return time.perf_counter() - start

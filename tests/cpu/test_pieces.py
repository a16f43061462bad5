"""How a phase's work is dealt out: every part once, and done nearly together by unequal workers."""

import heapq

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.pieces import LEAST_BYTES, MAX_ROUNDS, num_rounds, piece_range

ROUNDS = st.integers(0, MAX_ROUNDS)


@settings(max_examples=200)
@given(total=st.integers(0, 10**9), rounds=ROUNDS, num_workers=st.integers(1, 256))
def test_pieces_follow_each_other_from_beginning_to_end(
    total: int, rounds: int, num_workers: int
) -> None:
    ends = [0]
    for piece in range(num_workers * (rounds + 1)):
        begin, end = piece_range.py_func(total, piece, rounds, num_workers)
        assert begin == ends[-1] <= end
        ends.append(end)
    assert ends[-1] == total


@given(num_bytes=st.integers(0, 2**40), num_workers=st.integers(1, 256))
def test_pieces_are_worth_their_taking(num_bytes: int, num_workers: int) -> None:
    rounds = num_rounds.py_func(num_bytes, num_workers)
    assert 0 <= rounds <= MAX_ROUNDS
    if rounds > 0:
        assert num_bytes / (num_workers << rounds) >= LEAST_BYTES
    if rounds < MAX_ROUNDS:
        assert num_bytes / (num_workers << rounds) < 2 * LEAST_BYTES


@given(
    speeds=st.lists(st.floats(0.6, 1.4), min_size=1, max_size=64),
    rounds=st.integers(4, MAX_ROUNDS),
)
def test_slow_workers_do_not_hold_up_the_others(speeds: list[float], rounds: int) -> None:
    """With speeds up to 2.3 times apart: at most a worker's last piece more than the ideal."""
    num_workers, total = len(speeds), 10**9
    free_at: list[tuple[float, int]] = []
    for piece in range(num_workers * (rounds + 1)):
        now, worker = (0.0, piece) if piece < num_workers else heapq.heappop(free_at)
        begin, end = piece_range.py_func(total, piece, rounds, num_workers)
        heapq.heappush(free_at, (now + (end - begin) / speeds[worker], worker))
    ideal = total / sum(speeds)
    mean = total / num_workers
    slowest = min(speeds)
    bound = max(ideal + mean / 16 / slowest * 2, mean / 2 / slowest)
    assert max(free_at)[0] <= bound * (1 + np.finfo(float).eps * 8)

"""Which experts of a step have many tokens, and how the workers share their matrices.

T tokens, S choices of a token, P pairs (token, expert), N experts taken, Q rows of their pairs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import F32
from cpu_kernels.kernel_paths import KernelPath
from cpu_kernels.pieces import piece_range

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

LEAST_ROWS = 16  # tokens are padded to these: a tile of AMX
# Rows of weights that a piece is a multiple of: whole tiles, and few sizes, since oneDNN prepares
# each new one.
STEP = 32
# What a row of weights costs beside its products, in tokens: read, and laid out anew by oneDNN.
READ_COST = 32
ROUNDS = 2  # of dealing out: a product is a call under Python's lock, not worth a tiny piece


@dataclass(frozen=True, slots=True, kw_only=True)
class BigExperts:
    """The experts taken from a step, ascending, and their pairs one behind the other.

    Rows ``starts[n]`` to ``starts[n + 1]`` belong to expert ``places[n]``: ``counts[n]`` pairs in
    the order of the step, then padding, whose tokens are -1.
    """

    places: list[int]
    counts: list[int]
    starts: list[int]
    token_Q: I64
    weight_Q: F32
    rest_TS: I32  # the ids that are left, -1 for a choice that was taken


class Piece(NamedTuple):
    """Rows ``first`` to ``last`` of the n-th expert's matrix."""

    n: int
    first: int
    last: int


def may_hand_over(path: KernelPath) -> bool:
    """Whether torch computes what these experts promise: it rounds x as it rounds the weights."""
    return path.name in ("bf16/bf16", "f32/f32")


def padded_rows(count: int) -> int:
    """Rows for ``count`` tokens: at most 8 sizes from one power of two to the next."""
    step = max(LEAST_ROWS, (1 << (count.bit_length() - 1)) // 8)
    return -(-count // step) * step


def whole_blocks(count: int) -> int:
    """Rows for ``count`` tokens, for those who do not mind how many sizes there are."""
    return -(-count // LEAST_ROWS) * LEAST_ROWS


def take_big(
    ids_TS: I32,
    weights_TS: F32,
    place_of: I32 | None,
    num_experts: int,
    least: int,
    padded: Callable[[int], int],
) -> BigExperts | None:
    """The experts that have ``least`` choices or more; None if there are none.

    Ids that name no expert are left where they are. ``padded``: rows for a number of tokens.
    """
    num_ids = num_experts if place_of is None else len(place_of)
    id_P = ids_TS.ravel()
    is_known_P = (id_P >= 0) & (id_P < num_ids)
    known_P = np.where(is_known_P, id_P, 0)
    place_P = np.where(is_known_P, known_P if place_of is None else place_of[known_P], -1)
    counts = np.bincount(place_P + 1, minlength=num_experts + 1)[1:]
    places = np.flatnonzero(counts >= least)
    if not places.size:
        return None
    starts_N = np.cumsum([0, *(padded(int(count)) for count in counts[places])])
    token_Q = np.full(starts_N[-1], -1, np.int64)
    weight_Q = np.zeros(starts_N[-1], np.float32)
    number_of_place = np.full(num_experts + 1, -1)  # the last one: no expert
    number_of_place[places] = np.arange(len(places))
    number_P = number_of_place[place_P]
    pair_M = np.argsort(number_P, kind="stable")[np.count_nonzero(number_P < 0) :]
    counts_N = counts[places]
    row_M = np.arange(len(pair_M)) + np.repeat(
        starts_N[:-1] - np.cumsum(counts_N) + counts_N, counts_N
    )
    token_Q[row_M] = pair_M // ids_TS.shape[1]
    weight_Q[row_M] = weights_TS.ravel()[pair_M]
    return BigExperts(
        places=places.tolist(),
        counts=counts_N.tolist(),
        starts=starts_N.tolist(),
        token_Q=token_Q,
        weight_Q=weight_Q,
        rest_TS=np.where(number_P >= 0, np.int32(-1), id_P).reshape(ids_TS.shape),
    )


def share_rows(starts: list[int], num_rows: int, num_workers: int) -> list[list[Piece]]:
    """All matrices of ``num_rows`` rows, one behind the other, in shares of falling cost.

    As many as :mod:`cpu_kernels.pieces` makes of ROUNDS: the first for one worker each.
    Every row is in one piece; a matrix has as few pieces as that allows, since each one's calls
    hold Python's lock.
    """
    steps = -(-num_rows // STEP)
    costs = [READ_COST + end - start for start, end in itertools.pairwise(starts)]
    total, before, share = steps * sum(costs), 0, 0
    shares: list[list[Piece]] = [[] for _ in range(num_workers * (ROUNDS + 1))]
    ends = [piece_range.py_func(total, n, ROUNDS, num_workers)[1] for n in range(len(shares))]
    for n, cost in enumerate(costs):
        first = 0
        while first < steps:
            last = min(-((before - ends[share]) // cost), steps)
            if first < last:
                shares[share].append(Piece(n, first * STEP, min(last * STEP, num_rows)))
                first = last
            if last < steps:
                share += 1
        before += steps * cost
    return shares

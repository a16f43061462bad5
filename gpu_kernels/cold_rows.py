"""Which rows of a step's cold experts are the device's, found from the ids alone.

The distinct cold experts of a step lie end to end in the order of their places in host memory. The
first so many rows of all that are the workers', those behind them the device's: the last experts
whole, and at most one in part. Every program that asks finds the same, so programs need not meet.

Shapes: T tokens, K choices, E experts (padded), P pairs of a piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import next_power_of_2

PIECE = 4096  # comparisons of an id with an expert at a time: 32 registers of 128 threads
MOST_PAIRS = 64  # of a piece


def piece_of(num_experts: int) -> dict[str, int]:
    """Compile-time sizes for a layer of so many experts, whatever the step."""
    block = max(16, next_power_of_2(num_experts))
    return {"BLOCK_E": block, "BLOCK_P": max(1, min(MOST_PAIRS, PIECE // block))}


def first_rows_reference(
    cold_TK: Tensor, place_E: Tensor, kept_N: Tensor, width: int, num_used: int
) -> Tensor:
    """Of each choice in ``cold_TK`` (-1: none) the first row that is the device's, int32."""
    cold = set(cold_TK[:num_used].flatten().tolist()) - {-1}
    ordered = sorted(cold, key=lambda expert: int(place_E[expert]))
    kept = int(kept_N[len(ordered)])
    first = {e: min(max(kept - width * rank, 0), width) for rank, e in enumerate(ordered)}
    found = [first.get(expert, width) for expert in cold_TK.flatten().tolist()]
    return torch.tensor(found, dtype=torch.int32).view(cold_TK.shape)


@triton.jit
def cold_experts(
    ids_ptr, slot_ptr, num_pairs, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr
):
    """1 for experts without a slot that the pairs ``ids_ptr[:num_pairs]`` name, 0 for others."""
    e_E = tl.arange(0, BLOCK_E)
    slot_E = tl.load(slot_ptr + e_E, mask=e_E < num_experts, other=0)
    is_there_E = tl.zeros([BLOCK_E], tl.int32)
    for begin in range(0, num_pairs, BLOCK_P):
        p_P = begin + tl.arange(0, BLOCK_P)
        ids_P = tl.load(ids_ptr + p_P, mask=p_P < num_pairs, other=-1)
        is_it_EP = (e_E[:, None] == ids_P[None, :]).to(tl.int32)
        is_there_E = tl.maximum(is_there_E, tl.max(is_it_EP, 1))
    return tl.where(slot_E < 0, is_there_E, 0)


@triton.jit
def first_rows(is_cold_E, cold_K, place_ptr, kept_ptr, width, num_experts, BLOCK_E: tl.constexpr):
    """The first rows of the experts ``cold_K``, of which -1 is none (any number)."""
    e_E = tl.arange(0, BLOCK_E)
    place_E = tl.load(place_ptr + e_E, mask=e_E < num_experts, other=-1)
    place_K = tl.load(place_ptr + cold_K, mask=cold_K >= 0, other=0)
    is_before_EK = place_E[:, None] < place_K[None, :]
    rank_K = tl.sum(tl.where(is_before_EK, is_cold_E[:, None], 0), 0)
    kept = tl.load(kept_ptr + tl.sum(is_cold_E, 0))
    return tl.minimum(tl.maximum(kept - rank_K * width, 0), width)

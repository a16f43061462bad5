"""How many distinct experts of a step are not on the device, counted from the ids alone.

Every program that asks finds the same number, so programs need not meet.

Shapes: E experts (padded), P pairs of a piece.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096  # comparisons of an id with an expert at a time: 32 registers of 128 threads
MOST_PAIRS = 64  # of a piece


def piece_of(num_experts: int) -> dict[str, int]:
    """Compile-time sizes for a layer of so many experts, whatever the step."""
    block = max(16, triton.next_power_of_2(num_experts))
    return {"BLOCK_E": block, "BLOCK_P": max(1, min(MOST_PAIRS, PIECE // block))}


def count_cold_reference(ids_TK: Tensor, slot_E: Tensor, num_used: int) -> int:
    """Of the first ``num_used`` tokens' experts, how many have no slot; -1 is no expert."""
    ids = set(ids_TK[:num_used].flatten().tolist()) - {-1}
    return sum(int(slot_E[expert]) < 0 for expert in ids)


@triton.jit
def count_cold(
    ids_ptr, slot_ptr, num_pairs, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Of a step of the pairs ``ids_ptr[:num_pairs]``."""
    e_E = tl.arange(0, BLOCK_E)
    slot_E = tl.load(slot_ptr + e_E, mask=e_E < num_experts, other=0)
    is_there_E = tl.zeros([BLOCK_E], tl.int32)
    for begin in range(0, num_pairs, BLOCK_P):
        p_P = begin + tl.arange(0, BLOCK_P)
        ids_P = tl.load(ids_ptr + p_P, mask=p_P < num_pairs, other=-1)
        is_it_EP = (e_E[:, None] == ids_P[None, :]).to(tl.int32)
        is_there_E = tl.maximum(is_there_E, tl.max(is_it_EP, 1))
    return tl.sum(tl.where(slot_E < 0, is_there_E, 0), 0)

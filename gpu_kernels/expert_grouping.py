"""(token, choice) pairs in the order of their experts' slots, found on the device.

A stable counting sort in two launches: each chunk of pairs counts its slots; each chunk then finds
its places from all counts. Pairs of experts that are not resident are left out. A chunk is as short
as can be while the chunks are few: a program's steps wait for each other, and 16,384 pairs in 16
chunks of 8 steps took 27 us, nearly all of it waiting.
Shapes: T tokens, K choices of a token, P = T * K pairs, E experts, S slots; in kernels X chunks,
C pairs of a step, B bins (the slots and one for what is left out, padded to a power of two).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import cdiv, next_power_of_2

STEP = 128  # ranks compare 128 x 128 pairs at a time
MAX_CHUNKS = 128  # every chunk reads the counts of all
MAX_SLOTS = 1023


@dataclass(frozen=True, slots=True)
class Grouping:
    """Slot s owns ``pair_P[first_S1[s] : first_S1[s + 1]]``, ascending; int32 on the device.

    Pair t * K + k is choice k of token t. What lies beyond the last slot's pairs is undefined.
    """

    pair_P: Tensor
    first_S1: Tensor

    @classmethod
    def empty(cls, num_pairs: int, num_slots: int, device: torch.device) -> Grouping:
        return cls(
            torch.empty(num_pairs, dtype=torch.int32, device=device),
            torch.empty(num_slots + 1, dtype=torch.int32, device=device),
        )


def group_pairs(
    ids_TK: Tensor, slot_E: Tensor, num_slots: int, *, out: Grouping | None = None
) -> Grouping:
    """Group the pairs by slot; ids and slots int32, -1 as in ``expert_decode``. No host sync."""
    num_pairs = ids_TK.numel()
    assert ids_TK.dtype == slot_E.dtype == torch.int32 and 0 < num_slots <= MAX_SLOTS
    assert ids_TK.is_contiguous() and slot_E.is_contiguous() and ids_TK.device == slot_E.device
    if out is None:
        out = Grouping.empty(num_pairs, num_slots, ids_TK.device)
    assert out.pair_P.shape[0] >= num_pairs and out.first_S1.shape == (num_slots + 1,)
    bins = max(16, next_power_of_2(num_slots + 1))
    num_steps = max(cdiv(num_pairs, STEP * MAX_CHUNKS), 1)  # of a chunk
    num_chunks = max(cdiv(num_pairs, STEP * num_steps), 1)
    counts_XB = torch.empty((num_chunks, bins), dtype=torch.int32, device=ids_TK.device)
    sizes = {"NUM_SLOTS": num_slots, "STEP": STEP, "BINS": bins}
    _count_kernel[(num_chunks,)](ids_TK, slot_E, counts_XB, num_pairs, num_steps, **sizes)
    _place_kernel[(num_chunks,)](
        ids_TK,
        slot_E,
        counts_XB,
        out.pair_P,
        out.first_S1,
        num_pairs,
        num_steps,
        **sizes,
        num_warps=4,  # with 8 the slots of a step are loaded for every pair of pairs
    )
    return out


def group_pairs_reference(ids_TK: Tensor, slot_E: Tensor, num_slots: int) -> Grouping:
    """The same in plain torch, without undefined pairs."""
    slot_P = slot_E[ids_TK.flatten().clamp(min=0).long()]
    slot_P = slot_P.masked_fill((ids_TK.flatten() < 0) | (slot_P < 0), num_slots).long()
    first_S1 = torch.bincount(slot_P, minlength=num_slots + 1).cumsum(0).roll(1)
    first_S1[0] = 0
    pair_P = slot_P.argsort(stable=True)[: int(first_S1[-1])]
    return Grouping(pair_P.int(), first_S1.int())


@triton.jit
def _load_slots(ids_ptr, slot_ptr, pair_C, num_pairs, NUM_SLOTS: tl.constexpr):
    """The pairs' slots; NUM_SLOTS where there is none."""
    expert_C = tl.load(ids_ptr + pair_C, mask=pair_C < num_pairs, other=-1)
    slot_C = tl.load(slot_ptr + expert_C, mask=expert_C >= 0, other=-1)
    return tl.where(slot_C < 0, NUM_SLOTS, slot_C)


# a number of steps that is known would be compiled anew for each length of a prompt
@triton.jit(do_not_specialize=["num_pairs", "num_steps"])
def _count_kernel(
    ids_ptr,
    slot_ptr,
    counts_ptr,
    num_pairs,
    num_steps,
    NUM_SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk = tl.program_id(0)
    count_B = tl.zeros([BINS], tl.int32)
    for step in range(0, num_steps):
        pair_C = (chunk * num_steps + step) * STEP + tl.arange(0, STEP)
        slot_C = _load_slots(ids_ptr, slot_ptr, pair_C, num_pairs, NUM_SLOTS)
        count_B += tl.histogram(slot_C, BINS)
    tl.store(counts_ptr + chunk * BINS + tl.arange(0, BINS), count_B)


@triton.jit(do_not_specialize=["num_pairs", "num_steps"])
def _place_kernel(
    ids_ptr,
    slot_ptr,
    counts_ptr,
    pair_ptr,
    first_ptr,
    num_pairs,
    num_steps,
    NUM_SLOTS: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
):
    chunk = tl.program_id(0)
    num_chunks = tl.num_programs(0)
    X: tl.constexpr = 8192 // BINS  # 64 counts a thread
    bin_B = tl.arange(0, BINS)
    total_XB = tl.zeros([X, BINS], tl.int32)
    before_XB = tl.zeros([X, BINS], tl.int32)
    for first_chunk in range(0, num_chunks, X):
        chunk_X = first_chunk + tl.arange(0, X)
        count_ptr_XB = counts_ptr + chunk_X[:, None] * BINS + bin_B[None, :]
        count_XB = tl.load(count_ptr_XB, mask=(chunk_X < num_chunks)[:, None], other=0)
        total_XB += count_XB
        before_XB += tl.where((chunk_X < chunk)[:, None], count_XB, 0)
    total_B = tl.sum(total_XB, 0)
    first_B = tl.cumsum(total_B, 0) - total_B
    if chunk == 0:
        tl.store(first_ptr + bin_B, first_B, mask=bin_B <= NUM_SLOTS)

    next_B = first_B + tl.sum(before_XB, 0)  # where each slot's next pair of this chunk goes
    inside_C = tl.arange(0, STEP)
    for step in range(0, num_steps):
        pair_C = (chunk * num_steps + step) * STEP + inside_C
        slot_C = _load_slots(ids_ptr, slot_ptr, pair_C, num_pairs, NUM_SLOTS)
        is_same_CC = slot_C[:, None] == slot_C[None, :]
        is_earlier_CC = inside_C[:, None] < inside_C[None, :]
        # over the first axis: most of it lies in a thread's registers
        rank_C = tl.sum((is_same_CC & is_earlier_CC).to(tl.int32), 0)
        place_C = tl.gather(next_B, slot_C, 0) + rank_C
        tl.store(pair_ptr + place_C, pair_C, mask=slot_C < NUM_SLOTS)
        next_B += tl.histogram(slot_C, BINS)

"""Which of a step's cold experts the device pulls: reads from mapped host memory by itself.

The distinct cold experts of the step are numbered in the order in which they first appear, tokens
from the first to the last, choices within a token. Of n of them the last ``pulls[n]`` are pulled.
Every program that asks finds the same answer from the ids alone, so programs need not meet.

Shapes: K choices of a token (padded in kernels), E experts (padded), P pairs of a piece,
N counts 0, 1, ...
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096  # comparisons of an id with an expert at a time: 32 registers of 128 threads
MOST_PAIRS = 64  # of a piece
NEVER = tl.constexpr(2**30)  # no pair: where an expert does not appear


def piece_of(num_experts: int) -> dict[str, int]:
    """Compile-time sizes for a layer of so many experts, whatever the step."""
    block = max(16, triton.next_power_of_2(num_experts))
    return {"BLOCK_E": block, "BLOCK_P": max(1, min(MOST_PAIRS, PIECE // block))}


def pulled_reference(ids_TK: Tensor, slot_E: Tensor, pulls_N: Tensor, num_used: int) -> Tensor:
    """The ids of the first ``num_used`` tokens whose experts are pulled, -1 elsewhere; int32."""
    ids = ids_TK[:num_used].flatten().tolist()
    cold = list(dict.fromkeys(e for e in ids if e >= 0 and int(slot_E[e]) < 0))
    kept = len(cold) - int(pulls_N[len(cold)])
    is_pulled_E = torch.zeros(len(slot_E) + 1, dtype=torch.bool, device=ids_TK.device)
    is_pulled_E[cold[kept:]] = True  # the last entry is that of -1
    pulled_TK = torch.where(is_pulled_E[ids_TK.long()], ids_TK, -1)
    pulled_TK[num_used:] = -1
    return pulled_TK


@triton.jit
def is_pulled(
    ids_K,
    ids_ptr,
    slot_ptr,
    pulls_ptr,
    num_pairs,
    num_experts,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Whether each of ``ids_K`` is pulled in a step of the pairs ``ids_ptr[:num_pairs]``."""
    e_E = tl.arange(0, BLOCK_E)
    slot_E = tl.load(slot_ptr + e_E, mask=e_E < num_experts, other=0)
    first_E = tl.full([BLOCK_E], NEVER, tl.int32)
    for begin in range(0, num_pairs, BLOCK_P):
        p_P = begin + tl.arange(0, BLOCK_P)
        ids_P = tl.load(ids_ptr + p_P, mask=p_P < num_pairs, other=-1)
        is_it_EP = e_E[:, None] == ids_P[None, :]
        first_E = tl.minimum(first_E, tl.min(tl.where(is_it_EP, p_P[None, :], NEVER), 1))
    first_E = tl.where(slot_E < 0, first_E, NEVER)
    num_cold = tl.sum((first_E < NEVER).to(tl.int32), 0)
    num_kept = num_cold - tl.load(pulls_ptr + num_cold)
    is_it_KE = ids_K[:, None] == e_E[None, :]
    first_K = tl.min(tl.where(is_it_KE, first_E[None, :], NEVER), 1)
    number_K = tl.sum((first_E[None, :] < first_K[:, None]).to(tl.int32), 1)
    return (first_K < NEVER) & (number_K >= num_kept)

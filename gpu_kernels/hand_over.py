"""Both ends of handing a layer's cold experts to the CPU: publish what it needs, collect its part.

``publish`` writes into mapped host memory, which a kernel reaches like its own; ``collect`` (see
``collect_parts``) reads the CPU's part from there, adds up and norms. Rows from the number in use
on are padding: they are no expert's and nobody reads them. Of the cold experts' rows the device may
pull the last ones, that is, read them from host memory by itself; which depends on nothing but what
the step chose.

Shapes: T tokens (rows), K choices of a token, E experts, H hidden, N counts of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.bell import ring_after_all
from gpu_kernels.cold_rows import cold_experts, first_rows, piece_of
from gpu_kernels.collect_parts import collect, collect_reference
from gpu_kernels.dependent_launch import dependent, let_next_start, wait_for_last
from gpu_kernels.host_words import Ring
from gpu_kernels.paged_tile import FLOAT_DTYPES
from gpu_kernels.whole_numbers import cdiv, next_power_of_2

__all__ = ["ColdWork", "Pulls", "collect", "collect_reference", "publish", "publish_reference"]

MAX_TOP_K = 16
ROW_H = 2048  # up to which one program of publish writes a token
BLOCK_H = 1024  # of a program of those that share one


@dataclass(frozen=True, slots=True)
class ColdWork:
    """What the CPU reads, in mapped host memory: its expert ids (-1: not its own) and inputs.

    ``ring``: what the CPU is told then; None: nothing.
    """

    x_TH: Tensor  # float32
    ids_TK: Tensor  # int32
    weights_TK: Tensor  # float32
    ring: Ring | None = None


@dataclass(frozen=True, slots=True)
class Pulls:
    """What the device pulls: of n distinct cold experts end to end, the rows from ``kept_N[n]`` on.

    They lie in the order of ``place_E``, each of ``width`` rows. ``publish`` writes the cold
    choices to ``ids_TK``, -1 elsewhere, and each one's first row to pull to ``first_TK``. All int32
    on the device.
    """

    kept_N: Tensor  # for every n that a step may have
    place_E: Tensor
    width: int
    ids_TK: Tensor
    first_TK: Tensor


def publish(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    num_used: Tensor,
    record_TK: Tensor,
    cold: ColdWork | None,
    *,
    pulls: Pulls | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``ids_TK`` with -1 for padding rows, for the device's own experts.

    ``ids_TK`` int32 in ``slot_E`` (int32; below 0: not on the device), ``num_used`` int32 ``[1]``
    on the device. ``record_TK`` (int32) gets the ids too. ``cold`` gets x as
    float32, the weights, and the ids with -1 for padding and for experts on the device; None: no
    expert of the layer is elsewhere. ``pulls`` gets the same ids, and rows. Safe in a CUDA graph.
    """
    out = torch.empty_like(ids_TK) if out is None else out
    _check_choices(x_TH, ids_TK, weights_TK, slot_E, num_used, record_TK, out)
    if cold is not None:
        _check_cold(x_TH, ids_TK, cold)
    if pulls is not None:
        assert cold is not None
        _check_pulls(ids_TK, slot_E, pulls)
    num_tokens, hidden = x_TH.shape
    top_k = ids_TK.shape[1]
    if num_tokens == 0:
        return out
    block = next_power_of_2(hidden) if hidden <= ROW_H else BLOCK_H
    num_blocks = 1 if cold is None else cdiv(hidden, block)
    ring = None if cold is None else cold.ring
    bell = None if ring is None else ring.bell
    _publish_kernel[(num_tokens, num_blocks)](
        x_TH,
        ids_TK,
        weights_TK,
        slot_E,
        num_used,
        record_TK,
        *((None,) * 3 if cold is None else (cold.x_TH, cold.ids_TK, cold.weights_TK)),
        *((None,) * 2 if ring is None else (ring.clear, ring.num_done)),
        *((None, 0) if bell is None else (bell.word, bell.number)),
        *(
            (None,) * 4
            if pulls is None
            else (pulls.kept_N, pulls.place_E, pulls.ids_TK, pulls.first_TK)
        ),
        out,
        x_TH.stride(0),
        hidden,
        slot_E.numel(),
        0 if pulls is None else pulls.width,
        TOP_K=top_k,
        BLOCK_H=block,
        BLOCK_K=next_power_of_2(top_k),
        HAS_COLD=cold is not None,
        IS_ALONE=num_tokens * num_blocks == 1,
        **piece_of(slot_E.numel()),
        **dependent(x_TH.device),
        num_warps=4,
    )
    return out


def _check_choices(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    num_used: Tensor,
    record_TK: Tensor,
    out: Tensor,
) -> None:
    assert x_TH.dtype in FLOAT_DTYPES and x_TH.stride(1) == 1
    assert ids_TK.shape[0] == x_TH.shape[0] and 1 <= ids_TK.shape[1] <= MAX_TOP_K
    _check_ids(ids_TK, ids_TK, record_TK, out)
    assert weights_TK.shape == ids_TK.shape and weights_TK.dtype == torch.float32
    assert weights_TK.is_contiguous()
    assert slot_E.ndim == 1 and slot_E.dtype == torch.int32 and slot_E.is_contiguous()
    assert num_used.shape == (1,) and num_used.dtype == torch.int32
    assert {t.device for t in (ids_TK, weights_TK, slot_E, num_used, out)} == {x_TH.device}


def _check_cold(x_TH: Tensor, ids_TK: Tensor, cold: ColdWork) -> None:
    _check_ids(ids_TK, cold.ids_TK)
    assert cold.x_TH.shape == x_TH.shape and cold.weights_TK.shape == ids_TK.shape
    assert cold.x_TH.dtype == cold.weights_TK.dtype == torch.float32
    assert cold.x_TH.is_contiguous() and cold.weights_TK.is_contiguous()
    if cold.ring is not None:
        cold.ring.check(ids_TK.device)


def _check_pulls(ids_TK: Tensor, slot_E: Tensor, pulls: Pulls) -> None:
    _check_ids(ids_TK, pulls.ids_TK, pulls.first_TK)
    assert pulls.width > 0
    for table in (pulls.kept_N, pulls.place_E):
        assert table.dtype == torch.int32 and table.is_contiguous()
    assert pulls.kept_N.numel() > min(ids_TK.numel(), slot_E.numel())
    assert pulls.place_E.shape == slot_E.shape
    ours = (pulls.kept_N, pulls.place_E, pulls.ids_TK, pulls.first_TK)
    assert {table.device for table in ours} == {ids_TK.device}


def _check_ids(ids_TK: Tensor, *like_TK: Tensor) -> None:
    for ids in like_TK:
        assert ids.shape == ids_TK.shape and ids.dtype == torch.int32 and ids.is_contiguous()


def publish_reference(ids_TK: Tensor, slot_E: Tensor, num_used: int) -> tuple[Tensor, Tensor]:
    """The ids that ``publish`` records and returns, and the cold ones."""
    used_TK = ids_TK.clone()
    used_TK[num_used:] = -1
    is_here_TK = slot_E[ids_TK.long()] >= 0
    return used_TK, used_TK.masked_fill(is_here_TK, -1)


@triton.jit(do_not_specialize=["number"])
def _publish_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    slot_ptr,
    used_ptr,
    record_ptr,
    cold_x_ptr,
    cold_ids_ptr,
    cold_weights_ptr,
    clear_ptr,
    done_ptr,
    bell_ptr,
    number,
    kept_ptr,
    place_ptr,
    pulled_ptr,
    first_ptr,
    out_ptr,
    stride_x,
    hidden,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_COLD: tl.constexpr,
    IS_ALONE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_used = tl.load(used_ptr)
    is_used = token < num_used
    if HAS_COLD:
        h_H = block * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_H = (h_H < hidden) & is_used
        x_H = tl.load(x_ptr + token * stride_x + h_H, mask=mask_H, other=0.0)
        tl.store(cold_x_ptr + token * hidden + h_H, x_H.to(tl.float32), mask=mask_H)
    k_K = tl.arange(0, BLOCK_K)
    is_choice_K = (k_K < TOP_K) & (block == 0)  # one program of a token's writes them
    at_K = token * TOP_K + k_K
    ids_K = tl.load(ids_ptr + at_K, mask=is_choice_K & is_used, other=-1)
    tl.store(out_ptr + at_K, ids_K, mask=is_choice_K)
    tl.store(record_ptr + at_K, ids_K, mask=is_choice_K)
    if HAS_COLD:
        slot_K = tl.load(slot_ptr + ids_K, mask=ids_K >= 0, other=-1)
        weights_K = tl.load(weights_ptr + at_K, mask=is_choice_K, other=0.0)
        cold_K = tl.where(slot_K >= 0, -1, ids_K)
        tl.store(cold_ids_ptr + at_K, cold_K, mask=is_choice_K)
        tl.store(cold_weights_ptr + at_K, weights_K, mask=is_choice_K)
        if clear_ptr is not None:
            tl.store(clear_ptr, 0, mask=block == 0)
        if bell_ptr is not None:  # what follows is the device's own
            ring_after_all(done_ptr, bell_ptr, number, IS_ALONE)
        if pulled_ptr is not None:
            tl.store(pulled_ptr + at_K, cold_K, mask=is_choice_K)
            if block == 0:
                num_pairs = tl.minimum(num_used, tl.num_programs(0)) * TOP_K
                is_cold_E = cold_experts(
                    ids_ptr, slot_ptr, num_pairs, num_experts, BLOCK_E, BLOCK_P
                )
                first_K = first_rows(
                    is_cold_E, cold_K, place_ptr, kept_ptr, width, num_experts, BLOCK_E
                )
                tl.store(first_ptr + at_K, first_K, mask=is_choice_K)

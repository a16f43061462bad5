"""Attention over disjoint sets of keys, put together: FlashInfer's ``merge_state`` family.

A state is (v, lse_log2): the attention over some keys and the base-2 logarithm of the sum of their
exponentiated logits. (0, -inf) is the state of no keys; merging it changes nothing.
Shapes: N rows, S states, H heads, D head dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import cdiv, next_power_of_2

LN_2 = 0.6931471805599453
BLOCK_H = 4


def merge_state(
    v_a_NHD: Tensor, lse_a_NH: Tensor, v_b_NHD: Tensor, lse_b_NH: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the state of both; v in the type of ``v_a``, float32 ``lse_log2``."""
    v_NHD, lse_NH = torch.empty_like(v_a_NHD), torch.empty_like(lse_a_NH)
    _launch_pair(v_a_NHD, lse_a_NH, v_b_NHD, lse_b_NH, v_NHD, lse_NH)
    return v_NHD, lse_NH


def merge_state_in_place(
    v_NHD: Tensor, lse_NH: Tensor, v_other_NHD: Tensor, lse_other_NH: Tensor
) -> None:
    """(v, lse) becomes the state of both."""
    _launch_pair(v_NHD, lse_NH, v_other_NHD, lse_other_NH, v_NHD, lse_NH)


def merge_states(v_NSHD: Tensor, lse_NSH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state of all S states of each row: ([N, H, D], [N, H])."""
    num_rows, num_states, num_heads, head_dim = v_NSHD.shape
    assert v_NSHD.is_contiguous() and lse_NSH.is_contiguous()
    assert lse_NSH.shape == v_NSHD.shape[:3] and lse_NSH.dtype == torch.float32
    v_NHD = v_NSHD.new_empty((num_rows, num_heads, head_dim))
    lse_NH = lse_NSH.new_empty((num_rows, num_heads))
    if v_NHD.numel() > 0:
        _merge_all_kernel[(num_rows, num_heads)](
            v_NSHD,
            lse_NSH,
            v_NHD,
            lse_NH,
            num_states,
            NUM_HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK_S=16,
            BLOCK_D=next_power_of_2(head_dim),
        )
    return v_NHD, lse_NH


def merge_states_reference(v_NSHD: Tensor, lse_NSH: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, computed and returned in float32."""
    lse_NH = torch.logsumexp(lse_NSH.float() * LN_2, 1) / LN_2
    weight_NSH = torch.exp2(lse_NSH - lse_NH[:, None]).nan_to_num()
    return (weight_NSH[..., None] * v_NSHD.float()).sum(1), lse_NH


def _launch_pair(
    v_a_NHD: Tensor,
    lse_a_NH: Tensor,
    v_b_NHD: Tensor,
    lse_b_NH: Tensor,
    v_NHD: Tensor,
    lse_NH: Tensor,
) -> None:
    num_rows, num_heads, head_dim = v_a_NHD.shape
    for v in (v_a_NHD, v_b_NHD, v_NHD):
        assert v.shape == v_a_NHD.shape and v.stride(2) == 1 and v.device == v_a_NHD.device
    for lse in (lse_a_NH, lse_b_NH, lse_NH):
        assert lse.shape == (num_rows, num_heads) and lse.is_contiguous()
        assert lse.dtype == torch.float32 and lse.device == v_a_NHD.device
    if v_NHD.numel() == 0:
        return
    _merge_pair_kernel[(num_rows, cdiv(num_heads, BLOCK_H))](
        v_a_NHD,
        lse_a_NH,
        v_b_NHD,
        lse_b_NH,
        v_NHD,
        lse_NH,
        *v_a_NHD.stride()[:2],
        *v_b_NHD.stride()[:2],
        *v_NHD.stride()[:2],
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_H=BLOCK_H,
        BLOCK_D=next_power_of_2(head_dim),
    )


@triton.jit
def _merge_pair_kernel(
    v_a_ptr,
    lse_a_ptr,
    v_b_ptr,
    lse_b_ptr,
    v_ptr,
    lse_ptr,
    stride_a_row,
    stride_a_head,
    stride_b_row,
    stride_b_head,
    stride_row,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    d_D = tl.arange(0, BLOCK_D)
    is_head_H = h_H < NUM_HEADS
    mask_HD = is_head_H[:, None] & (d_D < HEAD_DIM)[None, :]
    lse_offset_H = row * NUM_HEADS + h_H
    lse_a_H = tl.load(lse_a_ptr + lse_offset_H, mask=is_head_H, other=0.0)
    lse_b_H = tl.load(lse_b_ptr + lse_offset_H, mask=is_head_H, other=0.0)
    a_offset_HD = row * stride_a_row + h_H[:, None] * stride_a_head + d_D
    b_offset_HD = row * stride_b_row + h_H[:, None] * stride_b_head + d_D
    v_a_HD = tl.load(v_a_ptr + a_offset_HD, mask=mask_HD, other=0.0).to(tl.float32)
    v_b_HD = tl.load(v_b_ptr + b_offset_HD, mask=mask_HD, other=0.0).to(tl.float32)
    max_H = tl.maximum(lse_a_H, lse_b_H)
    base_H = tl.where(max_H == float("-inf"), 0.0, max_H)
    weight_a_H = tl.exp2(lse_a_H - base_H)
    weight_b_H = tl.exp2(lse_b_H - base_H)
    sum_H = weight_a_H + weight_b_H
    safe_H = tl.where(sum_H > 0.0, sum_H, 1.0)
    v_HD = (weight_a_H[:, None] * v_a_HD + weight_b_H[:, None] * v_b_HD) / safe_H[:, None]
    offset_HD = row * stride_row + h_H[:, None] * stride_head + d_D
    tl.store(v_ptr + offset_HD, v_HD.to(v_ptr.dtype.element_ty), mask=mask_HD)
    lse_H = tl.where(sum_H > 0.0, max_H + tl.log2(safe_H), float("-inf"))
    tl.store(lse_ptr + lse_offset_H, lse_H, mask=is_head_H)


@triton.jit(do_not_specialize=["num_states"])
def _merge_all_kernel(
    v_in_ptr,
    lse_in_ptr,
    v_ptr,
    lse_ptr,
    num_states,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    d_D = tl.arange(0, BLOCK_D)
    acc_D = tl.zeros([BLOCK_D], tl.float32)
    running_max = float("-inf")
    weight_sum = 0.0
    for first in range(0, num_states, BLOCK_S):
        s_S = first + tl.arange(0, BLOCK_S)
        row_S = (row * num_states + s_S) * NUM_HEADS + head
        lse_S = tl.load(lse_in_ptr + row_S, mask=s_S < num_states, other=float("-inf"))
        mask_SD = (s_S < num_states)[:, None] & (d_D < HEAD_DIM)[None, :]
        v_SD = tl.load(v_in_ptr + row_S[:, None] * HEAD_DIM + d_D, mask=mask_SD, other=0.0)
        new_max = tl.maximum(running_max, tl.max(lse_S, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight_S = tl.exp2(lse_S - base)
        decay = tl.exp2(running_max - base)
        acc_D = acc_D * decay + tl.sum(weight_S[:, None] * v_SD.to(tl.float32), 0)
        weight_sum = weight_sum * decay + tl.sum(weight_S, 0)
        running_max = new_max
    safe_sum = tl.where(weight_sum > 0.0, weight_sum, 1.0)
    offset = row * NUM_HEADS + head
    v_D = (acc_D / safe_sum).to(v_ptr.dtype.element_ty)
    tl.store(v_ptr + offset * HEAD_DIM + d_D, v_D, mask=d_D < HEAD_DIM)
    lse = tl.where(weight_sum > 0.0, running_max + tl.log2(safe_sum), float("-inf"))
    tl.store(lse_ptr + offset, lse)

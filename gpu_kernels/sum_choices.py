"""A token's result from its pairs' partial rows: the sum of weight * row, in the choices' order.

Shapes: T tokens, K choices of a token, P = T * K pairs, E experts, H hidden; N tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import cdiv

BLOCK_N, BLOCK_H = 1, 1024  # 40 registers, so that 48 warps share a multiprocessor; 4 x 512: 64


def sum_choices_of_tokens(
    part_PH: Tensor, ids_TK: Tensor, weights_TK: Tensor, slot_E: Tensor, out_TH: Tensor
) -> None:
    """Write each token's sum over its resident choices into ``out_TH`` (float32).

    Row t * K + k of ``part_PH`` belongs to choice k of token t; rows of experts that are not
    resident are not read.
    """
    num_tokens, top_k = ids_TK.shape
    hidden = out_TH.shape[1]
    assert part_PH.shape[0] >= ids_TK.numel() and part_PH.shape[1] == hidden
    assert part_PH.is_contiguous() and out_TH.stride(1) == 1 and out_TH.dtype == torch.float32
    if num_tokens == 0:
        return
    grid = (cdiv(num_tokens, BLOCK_N), cdiv(hidden, BLOCK_H))
    _sum_kernel[grid](
        part_PH,
        ids_TK,
        weights_TK,
        slot_E,
        out_TH,
        out_TH.stride(0),
        num_tokens,
        HIDDEN=hidden,
        TOP_K=top_k,
        BLOCK_N=BLOCK_N,
        BLOCK_H=BLOCK_H,
        num_warps=4,
    )


def sum_choices_reference(
    part_PH: Tensor, ids_TK: Tensor, weights_TK: Tensor, slot_E: Tensor
) -> Tensor:
    """The same in plain torch, float32 ``[T, H]``."""
    is_resident_TK = (ids_TK >= 0) & (slot_E[ids_TK.clamp(min=0)] >= 0)
    part_TKH = part_PH[: ids_TK.numel()].unflatten(0, ids_TK.shape).float()
    part_TKH = part_TKH.masked_fill(~is_resident_TK[:, :, None], 0.0)
    return torch.einsum("tk,tkh->th", weights_TK, part_TKH)


@triton.jit
def sum_choices(
    part_ptr,
    ids_ptr,
    weight_ptr,
    slot_ptr,
    token_N,
    is_token_N,
    h_H,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Columns ``h_H`` of the tokens' sums, float32 ``[N, H]``.

    A pair's row is the sum of SPLITS rows of ``part_ptr``.
    """
    sum_NH = tl.zeros([token_N.shape[0], h_H.shape[0]], tl.float32)
    for choice in tl.static_range(TOP_K):
        pair_N = token_N * TOP_K + choice
        expert_N = tl.load(ids_ptr + pair_N, mask=is_token_N, other=-1)
        slot_N = tl.load(slot_ptr + expert_N, mask=expert_N >= 0, other=-1)
        weight_N = tl.load(weight_ptr + pair_N, mask=is_token_N, other=0.0)
        mask_NH = (slot_N >= 0)[:, None] & (h_H < HIDDEN)[None, :]
        row_ptr_NH = part_ptr + (pair_N.to(tl.int64) * SPLITS * HIDDEN)[:, None] + h_H[None, :]
        row_NH = tl.zeros([token_N.shape[0], h_H.shape[0]], tl.float32)
        for split in tl.static_range(SPLITS):
            # from L2: other programs of the same launch may have written them
            part_ptr_NH = row_ptr_NH + split * HIDDEN
            part_NH = tl.load(part_ptr_NH, mask=mask_NH, other=0.0, cache_modifier=".cg")
            row_NH += part_NH.to(tl.float32)
        sum_NH += tl.where(mask_NH, weight_N[:, None], 0.0) * row_NH
    return sum_NH


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_kernel(
    part_ptr,
    ids_ptr,
    weight_ptr,
    slot_ptr,
    out_ptr,
    stride_out,
    num_tokens,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_token_N = token_N < num_tokens
    sum_NH = sum_choices(
        part_ptr, ids_ptr, weight_ptr, slot_ptr, token_N, is_token_N, h_H, HIDDEN, TOP_K, 1
    )
    out_offset_NH = token_N.to(tl.int64)[:, None] * stride_out + h_H[None, :]
    mask_NH = is_token_N[:, None] & (h_H < HIDDEN)[None, :]
    tl.store(out_ptr + out_offset_NH, sum_NH, mask=mask_NH)

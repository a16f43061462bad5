"""Per-head RMS norm (optional), rotary embedding and the write of K and V into the paged cache.

One program per token. Everything is float32 inside and rounded once on the way out.
Shapes: T tokens, H query heads, K KV heads, D head dim, S positions of the table, R = D / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rope_and_append(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    kv_cache: Tensor,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q (in place, or into ``out``) and write rotated K and plain V into the cache.

    Rotation is NeoX style: element d pairs with d + D/2. ``cos_SR`` and ``sin_SR`` are float32
    tables by position; ``slots_T`` is page * page_size + offset, distinct per token; both index
    tensors are int64 and in range. q, k and v may be slices of one fused projection. Returns q.
    """
    out = q_THD if out is None else out
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    assert k_TKD.shape == v_TKD.shape == (num_tokens, num_kv_heads, head_dim)
    assert out.shape == q_THD.shape and head_dim % 2 == 0
    assert kv_cache.shape[1] == 2 and kv_cache.shape[3:] == (num_kv_heads, head_dim)
    assert all(x.stride(-1) == 1 for x in (q_THD, k_TKD, v_TKD, out, kv_cache))
    assert q_THD.dtype == k_TKD.dtype == v_TKD.dtype == out.dtype == kv_cache.dtype
    for table in (cos_SR, sin_SR):
        assert table.dtype == torch.float32 and table.is_contiguous()
        assert table.shape == (cos_SR.shape[0], head_dim // 2)
    for index_T in (positions_T, slots_T):
        assert index_T.dtype == torch.int64 and index_T.shape == (num_tokens,)
        assert index_T.is_contiguous() and index_T.device == q_THD.device
    assert (q_norm_D is None) == (k_norm_D is None), "norm both q and k, or neither"
    if num_tokens == 0:
        return out
    _append_kernel[(num_tokens,)](
        q_THD,
        k_TKD,
        v_TKD,
        cos_SR,
        sin_SR,
        positions_T,
        slots_T,
        kv_cache,
        q_norm_D,
        k_norm_D,
        out,
        *q_THD.stride()[:2],
        *k_TKD.stride()[:2],
        *v_TKD.stride()[:2],
        *out.stride()[:2],
        *kv_cache.stride()[:4],
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF_DIM=head_dim // 2,
        PAGE_SIZE=kv_cache.shape[2],
        BLOCK_H=triton.next_power_of_2(num_heads),
        BLOCK_K=triton.next_power_of_2(num_kv_heads),
        BLOCK_R=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=q_norm_D is not None,
        num_warps=4,
    )
    return out


def rope_and_append_reference(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    kv_cache: Tensor,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The same in plain torch: returns the rotated q in float32 and writes the cache."""
    cos_T1R, sin_T1R = (table[positions_T].unsqueeze(1) for table in (cos_SR, sin_SR))
    k_rotated_TKD = _rotate_reference(k_TKD, k_norm_D, cos_T1R, sin_T1R, eps)
    page_T, offset_T = slots_T // kv_cache.shape[2], slots_T % kv_cache.shape[2]
    kv_cache[page_T, 0, offset_T] = k_rotated_TKD.to(kv_cache.dtype)
    kv_cache[page_T, 1, offset_T] = v_TKD
    return _rotate_reference(q_THD, q_norm_D, cos_T1R, sin_T1R, eps)


def _rotate_reference(
    x_THD: Tensor, norm_D: Tensor | None, cos_T1R: Tensor, sin_T1R: Tensor, eps: float
) -> Tensor:
    x_THD = x_THD.float()
    if norm_D is not None:
        x_THD = x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + eps) * norm_D.float()
    low, high = x_THD.chunk(2, dim=-1)
    return torch.cat([low * cos_T1R - high * sin_T1R, high * cos_T1R + low * sin_T1R], dim=-1)


@triton.jit
def _rotate_heads(
    src_ptr,
    dst_ptr,
    norm_ptr,
    cos_R,
    sin_R,
    stride_src_head,
    stride_dst_head,
    eps,
    NUM_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    h_H = tl.arange(0, BLOCK_H)
    r_R = tl.arange(0, BLOCK_R)
    mask_HR = (h_H < NUM_HEADS)[:, None] & (r_R < HALF_DIM)[None, :]
    src_HR = src_ptr + h_H[:, None] * stride_src_head + r_R[None, :]
    low_HR = tl.load(src_HR, mask=mask_HR, other=0.0).to(tl.float32)
    high_HR = tl.load(src_HR + HALF_DIM, mask=mask_HR, other=0.0).to(tl.float32)
    if HAS_NORM:
        square_H = tl.sum(low_HR * low_HR, 1) + tl.sum(high_HR * high_HR, 1)
        scale_H = 1.0 / tl.sqrt(square_H / (2 * HALF_DIM) + eps)
        norm_low_R = tl.load(norm_ptr + r_R, mask=r_R < HALF_DIM, other=0.0).to(tl.float32)
        norm_high_R = tl.load(norm_ptr + HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)
        low_HR = low_HR * scale_H[:, None] * norm_low_R[None, :]
        high_HR = high_HR * scale_H[:, None] * norm_high_R.to(tl.float32)[None, :]
    dst_HR = dst_ptr + h_H[:, None] * stride_dst_head + r_R[None, :]
    dtype: tl.constexpr = dst_ptr.dtype.element_ty
    rotated_low_HR = low_HR * cos_R[None, :] - high_HR * sin_R[None, :]
    rotated_high_HR = high_HR * cos_R[None, :] + low_HR * sin_R[None, :]
    tl.store(dst_HR, rotated_low_HR.to(dtype), mask=mask_HR)
    tl.store(dst_HR + HALF_DIM, rotated_high_HR.to(dtype), mask=mask_HR)


@triton.jit
def _append_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    slot_ptr,
    kv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    out_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_page,
    stride_cache_v,
    stride_cache_token,
    stride_cache_head,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + token)
    r_R = tl.arange(0, BLOCK_R)
    cos_R = tl.load(cos_ptr + position * HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)
    sin_R = tl.load(sin_ptr + position * HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)
    cache_ptr = kv_ptr + (slot // PAGE_SIZE) * stride_page + (slot % PAGE_SIZE) * stride_cache_token
    _rotate_heads(
        q_ptr + token * stride_q_token,
        out_ptr + token * stride_out_token,
        q_norm_ptr,
        cos_R,
        sin_R,
        stride_q_head,
        stride_out_head,
        eps,
        NUM_HEADS,
        HALF_DIM,
        BLOCK_H,
        BLOCK_R,
        HAS_NORM,
    )
    _rotate_heads(
        k_ptr + token * stride_k_token,
        cache_ptr,
        k_norm_ptr,
        cos_R,
        sin_R,
        stride_k_head,
        stride_cache_head,
        eps,
        NUM_KV_HEADS,
        HALF_DIM,
        BLOCK_K,
        BLOCK_R,
        HAS_NORM,
    )
    h_K = tl.arange(0, BLOCK_K)
    d_D = tl.arange(0, 2 * BLOCK_R)
    mask_KD = (h_K < NUM_KV_HEADS)[:, None] & (d_D < 2 * HALF_DIM)[None, :]
    v_offset_KD = token * stride_v_token + h_K[:, None] * stride_v_head + d_D[None, :]
    v_KD = tl.load(v_ptr + v_offset_KD, mask=mask_KD)
    cache_offset_KD = stride_cache_v + h_K[:, None] * stride_cache_head + d_D[None, :]
    tl.store(cache_ptr + cache_offset_KD, v_KD, mask=mask_KD)

"""Per-head RMS norm (optional), rotary embedding and the write of K and V into the paged cache.

One program per token. Everything is float32 inside and rounded once on the way out: to the type of
the cache, or to codes with a scale (see kv_quant).
Shapes: T tokens, H query heads, K KV heads, D head dim, S positions of the table, R = D / 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.checks import check_range
from gpu_kernels.dependent_launch import dependent, let_next_start, wait_for_last
from gpu_kernels.kv_append_reference import rope_and_append_reference
from gpu_kernels.kv_quant import INT4, LARGEST, as_loaded, check_kv_dtypes, head_dim_of
from gpu_kernels.kv_store import store_half, store_kv
from gpu_kernels.rotary_heads import load_heads, rotate
from gpu_kernels.whole_numbers import next_power_of_2

__all__ = ["rope_and_append", "rope_and_append_reference"]


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
    kv_scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q (in place, or into ``out``) and write rotated K and plain V into the cache.

    Rotation is NeoX style: element d pairs with d + D/2. ``cos_SR`` and ``sin_SR`` are float32
    tables by position; ``slots_T`` is page * page_size + offset, distinct per token, or -1 for a
    token whose K and V are not written; both index tensors are int32 or int64 and in range. q, k
    and v may be slices of one fused projection. With ``kv_scales`` the cache is of codes and the
    scales are written too. Returns q.
    """
    out = q_THD if out is None else out
    _check_heads(q_THD, k_TKD, v_TKD, out, kv_cache)
    check_kv_dtypes(kv_cache, kv_scales, q_THD.dtype)
    _check_tables(q_THD, cos_SR, sin_SR, positions_T, slots_T)
    assert (q_norm_D is None) == (k_norm_D is None), "norm both q and k, or neither"
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    if num_tokens == 0:
        return out
    check_range("slots", slots_T, -1, len(kv_cache) * kv_cache.shape[2])
    check_range("positions", positions_T, 0, len(cos_SR))
    _append_kernel[(num_tokens,)](
        q_THD,
        k_TKD,
        v_TKD,
        cos_SR,
        sin_SR,
        positions_T,
        slots_T,
        *as_loaded(kv_cache, kv_scales),
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
        BLOCK_H=next_power_of_2(num_heads),
        BLOCK_K=next_power_of_2(num_kv_heads),
        BLOCK_R=next_power_of_2(head_dim // 2),
        HAS_NORM=q_norm_D is not None,
        IS_FP8=kv_cache.dtype == torch.float8_e4m3fn,
        IS_INT4=kv_cache.dtype == INT4,
        LARGEST=0.0 if kv_scales is None else LARGEST[kv_cache.dtype],
        **dependent(q_THD.device),
        num_warps=4,
    )
    return out


def _check_heads(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, out: Tensor, kv_cache: Tensor
) -> None:
    num_tokens, _, head_dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    assert k_TKD.shape == v_TKD.shape == (num_tokens, num_kv_heads, head_dim)
    assert out.shape == q_THD.shape and head_dim % 2 == 0
    assert kv_cache.shape[1] == 2 and kv_cache.shape[3] == num_kv_heads
    assert head_dim_of(kv_cache) == head_dim
    assert all(x.stride(-1) == 1 for x in (q_THD, k_TKD, v_TKD, out, kv_cache))
    assert q_THD.dtype == k_TKD.dtype == v_TKD.dtype == out.dtype


def _check_tables(
    q_THD: Tensor, cos_SR: Tensor, sin_SR: Tensor, positions_T: Tensor, slots_T: Tensor
) -> None:
    num_tokens, _, head_dim = q_THD.shape
    for table in (cos_SR, sin_SR):
        assert table.dtype == torch.float32 and table.is_contiguous()
        assert table.shape == (cos_SR.shape[0], head_dim // 2)
    for index_T in (positions_T, slots_T):
        assert index_T.dtype in (torch.int32, torch.int64) and index_T.shape == (num_tokens,)
        assert index_T.is_contiguous() and index_T.device == q_THD.device


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
    kv_scales_ptr,
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
    IS_FP8: tl.constexpr,
    IS_INT4: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    r_R = tl.arange(0, BLOCK_R)
    cos_R = tl.load(cos_ptr + position * HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)
    sin_R = tl.load(sin_ptr + position * HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)

    q_token_ptr = q_ptr + token * stride_q_token
    low_HR, high_HR, mask_HR = load_heads(
        q_token_ptr, stride_q_head, NUM_HEADS, HALF_DIM, BLOCK_H, BLOCK_R
    )
    low_HR, high_HR = rotate(
        low_HR, high_HR, q_norm_ptr, cos_R, sin_R, eps, HALF_DIM, BLOCK_R, HAS_NORM
    )
    h_H = tl.arange(0, BLOCK_H)
    out_ptr_HR = out_ptr + token * stride_out_token + h_H[:, None] * stride_out_head + r_R[None, :]
    store_half(out_ptr_HR, low_HR, mask_HR, False)
    store_half(out_ptr_HR + HALF_DIM, high_HR, mask_HR, False)

    if slot < 0:
        return
    cache_ptr = kv_ptr + page * stride_page + offset * stride_cache_token
    scale_ptr = kv_scales_ptr
    if LARGEST > 0:
        scale_ptr = kv_scales_ptr + page * (2 * NUM_KV_HEADS * PAGE_SIZE) + offset
    k_token_ptr = k_ptr + token * stride_k_token
    low_KR, high_KR, mask_KR = load_heads(
        k_token_ptr, stride_k_head, NUM_KV_HEADS, HALF_DIM, BLOCK_K, BLOCK_R
    )
    low_KR, high_KR = rotate(
        low_KR, high_KR, k_norm_ptr, cos_R, sin_R, eps, HALF_DIM, BLOCK_R, HAS_NORM
    )
    store_kv(
        low_KR,
        high_KR,
        mask_KR,
        cache_ptr,
        stride_cache_head,
        scale_ptr,
        NUM_KV_HEADS,
        HALF_DIM,
        PAGE_SIZE,
        BLOCK_K,
        BLOCK_R,
        IS_FP8,
        IS_INT4,
        LARGEST,
    )
    v_token_ptr = v_ptr + token * stride_v_token
    low_KR, high_KR, mask_KR = load_heads(
        v_token_ptr, stride_v_head, NUM_KV_HEADS, HALF_DIM, BLOCK_K, BLOCK_R
    )
    store_kv(
        low_KR,
        high_KR,
        mask_KR,
        cache_ptr + stride_cache_v,
        stride_cache_head,
        scale_ptr + NUM_KV_HEADS * PAGE_SIZE if LARGEST > 0 else scale_ptr,
        NUM_KV_HEADS,
        HALF_DIM,
        PAGE_SIZE,
        BLOCK_K,
        BLOCK_R,
        IS_FP8,
        IS_INT4,
        LARGEST,
    )

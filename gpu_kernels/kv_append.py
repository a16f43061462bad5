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
from gpu_kernels.kv_quant import (
    AWAY,
    INT4,
    LARGEST,
    TO_NEAREST,
    check_kv_dtypes,
    head_dim_of,
    quantise_kv,
)

IN_KERNEL_AWAY = tl.constexpr(AWAY)
IN_KERNEL_NEAREST = tl.constexpr(TO_NEAREST)


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
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TKD.shape[1]
    assert k_TKD.shape == v_TKD.shape == (num_tokens, num_kv_heads, head_dim)
    assert out.shape == q_THD.shape and head_dim % 2 == 0
    assert kv_cache.shape[1] == 2 and kv_cache.shape[3] == num_kv_heads
    assert head_dim_of(kv_cache) == head_dim
    assert all(x.stride(-1) == 1 for x in (q_THD, k_TKD, v_TKD, out, kv_cache))
    assert q_THD.dtype == k_TKD.dtype == v_TKD.dtype == out.dtype
    check_kv_dtypes(kv_cache, kv_scales, q_THD.dtype)
    for table in (cos_SR, sin_SR):
        assert table.dtype == torch.float32 and table.is_contiguous()
        assert table.shape == (cos_SR.shape[0], head_dim // 2)
    for index_T in (positions_T, slots_T):
        assert index_T.dtype in (torch.int32, torch.int64) and index_T.shape == (num_tokens,)
        assert index_T.is_contiguous() and index_T.device == q_THD.device
    assert (q_norm_D is None) == (k_norm_D is None), "norm both q and k, or neither"
    if num_tokens == 0:
        return out
    check_range("slots", slots_T, -1, len(kv_cache) * kv_cache.shape[2])
    check_range("positions", positions_T, 0, len(cos_SR))
    is_fp8 = kv_cache.dtype == torch.float8_e4m3fn
    is_int4 = kv_cache.dtype == INT4
    if is_int4 and kv_scales is not None:
        kv_scales = kv_scales.view(torch.int32)
    _append_kernel[(num_tokens,)](
        q_THD,
        k_TKD,
        v_TKD,
        cos_SR,
        sin_SR,
        positions_T,
        slots_T,
        kv_cache.view(torch.uint8) if is_fp8 else kv_cache,
        kv_scales,
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
        IS_FP8=is_fp8,
        IS_INT4=is_int4,
        LARGEST=0.0 if kv_scales is None else LARGEST[kv_cache.dtype],
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
    *,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """The same in plain torch: returns the rotated q in float32 and writes the cache."""
    cos_T1R, sin_T1R = (table[positions_T.long()].unsqueeze(1) for table in (cos_SR, sin_SR))
    k_rotated_TKD = _rotate_reference(k_TKD, k_norm_D, cos_T1R, sin_T1R, eps)
    is_kept_T = slots_T >= 0
    kept_T = slots_T[is_kept_T].long()
    page_T, offset_T = kept_T // kv_cache.shape[2], kept_T % kv_cache.shape[2]
    for kind, x_TKD in enumerate((k_rotated_TKD[is_kept_T], v_TKD[is_kept_T])):
        if kv_scales is not None:
            x_TKD, scale_TK = quantise_kv(x_TKD, kv_cache.dtype)
            kv_scales[page_T, kind, :, offset_T] = scale_TK
        kv_cache[page_T, kind, offset_T] = x_TKD.to(kv_cache.dtype)
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
def _load_heads(
    src_ptr,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A token's heads as two halves in float32, and which of their elements there are."""
    h_H = tl.arange(0, BLOCK_H)
    r_R = tl.arange(0, BLOCK_R)
    mask_HR = (h_H < NUM_HEADS)[:, None] & (r_R < HALF_DIM)[None, :]
    src_HR = src_ptr + h_H[:, None] * stride_head + r_R[None, :]
    low_HR = tl.load(src_HR, mask=mask_HR, other=0.0).to(tl.float32)
    high_HR = tl.load(src_HR + HALF_DIM, mask=mask_HR, other=0.0).to(tl.float32)
    return low_HR, high_HR, mask_HR


@triton.jit
def _rotate(
    low_HR,
    high_HR,
    norm_ptr,
    cos_R,
    sin_R,
    eps,
    HALF_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    if HAS_NORM:
        r_R = tl.arange(0, BLOCK_R)
        square_H = tl.sum(low_HR * low_HR, 1) + tl.sum(high_HR * high_HR, 1)
        scale_H = 1.0 / tl.sqrt(square_H / (2 * HALF_DIM) + eps)
        norm_low_R = tl.load(norm_ptr + r_R, mask=r_R < HALF_DIM, other=0.0).to(tl.float32)
        norm_high_R = tl.load(norm_ptr + HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)
        low_HR = low_HR * scale_H[:, None] * norm_low_R[None, :]
        high_HR = high_HR * scale_H[:, None] * norm_high_R.to(tl.float32)[None, :]
    rotated_low_HR = low_HR * cos_R[None, :] - high_HR * sin_R[None, :]
    return rotated_low_HR, high_HR * cos_R[None, :] + low_HR * sin_R[None, :]


@triton.jit
def _store_half(dst_ptr_HR, x_HR, mask_HR, IS_FP8: tl.constexpr):
    if IS_FP8:
        x_HR = x_HR.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(dst_ptr_HR, x_HR.to(dst_ptr_HR.dtype.element_ty), mask=mask_HR)


@triton.jit
def _within(x_HR, LEAST: tl.constexpr, LARGEST: tl.constexpr):
    """x limited to what a code can be; NaN, which the scale tells of, as 0."""
    x_HR = tl.where(x_HR == x_HR, x_HR, 0.0)
    return tl.minimum(tl.maximum(x_HR, LEAST), LARGEST)


@triton.jit
def _round(x_HR):
    """To a whole number, half to even: what adding and taking away 1.5 * 2 ** 23 leaves."""
    return (x_HR + 12582912.0) - 12582912.0


@triton.jit
def _nan_of(low_HR, high_HR):
    """0, or NaN for a head with NaN or Inf: a sum of zeros keeps it, which a maximum would drop."""
    return tl.sum(low_HR * 0.0, 1) + tl.sum(high_HR * 0.0, 1)


@triton.jit
def _to_bfloat16(x_H, CARRY: tl.constexpr):
    """As float32 of which 16 bits are zeros (see kv_quant)."""
    return ((x_H.to(tl.int32, bitcast=True) + CARRY) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _byte_codes(low_HR, high_HR, IS_FP8: tl.constexpr, LARGEST: tl.constexpr):
    """Codes of eight bits, as floats, and each head's scale."""
    low_max_H, high_max_H = tl.max(tl.abs(low_HR), 1), tl.max(tl.abs(high_HR), 1)
    scale_H = (tl.maximum(low_max_H, high_max_H) + _nan_of(low_HR, high_HR)) / LARGEST
    inverse_H1 = (1.0 / tl.where(scale_H > 0.0, scale_H, 1.0))[:, None]
    low_HR, high_HR = low_HR * inverse_H1, high_HR * inverse_H1
    if not IS_FP8:
        low_HR, high_HR = _round(low_HR), _round(high_HR)
    return _within(low_HR, -LARGEST, LARGEST), _within(high_HR, -LARGEST, LARGEST), scale_H


@triton.jit
def _int4_codes(low_HR, high_HR, HALF_DIM: tl.constexpr, LARGEST: tl.constexpr):
    """Two codes a byte, and zero and scale of each head as an int32 (see kv_quant)."""
    is_dim_1R = (tl.arange(0, low_HR.shape[1]) < HALF_DIM)[None, :]
    least_HR = tl.where(is_dim_1R, tl.minimum(low_HR, high_HR), float("inf"))
    most_HR = tl.where(is_dim_1R, tl.maximum(low_HR, high_HR), float("-inf"))
    least_H, most_H = tl.min(least_HR, 1), tl.max(most_HR, 1)
    zero_H = _to_bfloat16(least_H + (most_H - least_H) * (8 / 15), IN_KERNEL_NEAREST)
    scale_H = tl.maximum((zero_H - least_H) * (1 / 8), (most_H - zero_H) * (1 / LARGEST))
    scale_H = _to_bfloat16(scale_H, IN_KERNEL_AWAY) + _nan_of(low_HR, high_HR)
    inverse_H1 = (1.0 / tl.where(scale_H > 0.0, scale_H, 1.0))[:, None]
    low_HR = _within(_round((low_HR - zero_H[:, None]) * inverse_H1), -1 - LARGEST, LARGEST)
    high_HR = _within(_round((high_HR - zero_H[:, None]) * inverse_H1), -1 - LARGEST, LARGEST)
    byte_HR = (low_HR.to(tl.int32) & 15) | ((high_HR.to(tl.int32) & 15) << 4)
    zero_bits_H = (zero_H.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    return byte_HR, (scale_H.to(tl.int32, bitcast=True) & -65536) | zero_bits_H


@triton.jit
def _store_kv(
    low_HR,
    high_HR,
    mask_HR,
    dst_ptr,
    stride_head,
    scale_ptr,
    NUM_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INT4: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Write heads to a slot of the cache, as codes with a scale where LARGEST is not 0."""
    h_H = tl.arange(0, BLOCK_H)
    dst_ptr_HR = dst_ptr + h_H[:, None] * stride_head + tl.arange(0, BLOCK_R)[None, :]
    if IS_INT4:
        byte_HR, pair_H = _int4_codes(low_HR, high_HR, HALF_DIM, LARGEST)
        tl.store(scale_ptr + h_H * PAGE_SIZE, pair_H, mask=h_H < NUM_HEADS)
        tl.store(dst_ptr_HR, byte_HR.to(dst_ptr.dtype.element_ty), mask=mask_HR)
    else:
        if LARGEST > 0:
            low_HR, high_HR, scale_H = _byte_codes(low_HR, high_HR, IS_FP8, LARGEST)
            tl.store(scale_ptr + h_H * PAGE_SIZE, scale_H, mask=h_H < NUM_HEADS)
        _store_half(dst_ptr_HR, low_HR, mask_HR, IS_FP8)
        _store_half(dst_ptr_HR + HALF_DIM, high_HR, mask_HR, IS_FP8)


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
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr + token).to(tl.int64)
    slot = tl.load(slot_ptr + token).to(tl.int64)
    page, offset = slot // PAGE_SIZE, slot % PAGE_SIZE
    r_R = tl.arange(0, BLOCK_R)
    cos_R = tl.load(cos_ptr + position * HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)
    sin_R = tl.load(sin_ptr + position * HALF_DIM + r_R, mask=r_R < HALF_DIM, other=0.0)

    q_token_ptr = q_ptr + token * stride_q_token
    low_HR, high_HR, mask_HR = _load_heads(
        q_token_ptr, stride_q_head, NUM_HEADS, HALF_DIM, BLOCK_H, BLOCK_R
    )
    low_HR, high_HR = _rotate(
        low_HR, high_HR, q_norm_ptr, cos_R, sin_R, eps, HALF_DIM, BLOCK_R, HAS_NORM
    )
    h_H = tl.arange(0, BLOCK_H)
    out_ptr_HR = out_ptr + token * stride_out_token + h_H[:, None] * stride_out_head + r_R[None, :]
    _store_half(out_ptr_HR, low_HR, mask_HR, False)
    _store_half(out_ptr_HR + HALF_DIM, high_HR, mask_HR, False)

    if slot < 0:
        return
    cache_ptr = kv_ptr + page * stride_page + offset * stride_cache_token
    scale_ptr = kv_scales_ptr
    if LARGEST > 0:
        scale_ptr = kv_scales_ptr + page * (2 * NUM_KV_HEADS * PAGE_SIZE) + offset
    k_token_ptr = k_ptr + token * stride_k_token
    low_KR, high_KR, mask_KR = _load_heads(
        k_token_ptr, stride_k_head, NUM_KV_HEADS, HALF_DIM, BLOCK_K, BLOCK_R
    )
    low_KR, high_KR = _rotate(
        low_KR, high_KR, k_norm_ptr, cos_R, sin_R, eps, HALF_DIM, BLOCK_R, HAS_NORM
    )
    _store_kv(
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
    low_KR, high_KR, mask_KR = _load_heads(
        v_token_ptr, stride_v_head, NUM_KV_HEADS, HALF_DIM, BLOCK_K, BLOCK_R
    )
    _store_kv(
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

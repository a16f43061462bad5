"""How a kernel writes heads to the cache: as numbers, or as codes with a scale.

The codes are those of ``kv_quant.quantise_kv``; the way back is ``kv_widen``.
Shapes: H heads, R elements of half a head, which comes as its low and its high half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.kv_quant import AWAY, TO_NEAREST

IN_KERNEL_AWAY = tl.constexpr(AWAY)
IN_KERNEL_NEAREST = tl.constexpr(TO_NEAREST)


@triton.jit
def store_half(dst_ptr_HR, x_HR, mask_HR, IS_FP8: tl.constexpr):
    """Write one half in the type of the elements there; with ``IS_FP8`` they are its bytes."""
    if IS_FP8:
        x_HR = x_HR.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(dst_ptr_HR, x_HR.to(dst_ptr_HR.dtype.element_ty), mask=mask_HR)


@triton.jit
def store_kv(
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
        store_half(dst_ptr_HR, low_HR, mask_HR, IS_FP8)
        store_half(dst_ptr_HR + HALF_DIM, high_HR, mask_HR, IS_FP8)


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

"""A token's heads in a kernel: as two halves, which rotary embedding turns against each other.

Shapes: H heads, R elements of half a head; dimensions are padded to powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_heads(
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
def rotate(
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
    """Both halves, normed first where ``HAS_NORM``, turned by the angles of a position."""
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

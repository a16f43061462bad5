"""Tiles of bf12 weights: three words of a row are eight bfloat16 numbers but for the row's scale.

Words, rows and depth lie and come as in :mod:`gpu_kernels.packed_tile`; the format is in
docs/packed-experts.md. Of 32-bit words a thread masks and scales pairs: 15 instructions for eight
weights of bfloat16 columns.
Shapes: B blocks, M = 16 B rows, S steps (of eight columns), R = 16 rows, D = 8 S depth, N columns
(tokens), J pairs of a step, H half of a pair.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.device import HAS_PTX
from gpu_kernels.packed_tile import rows_first


@triton.jit
def load_steps(block_ptr_B, first, SPEC: tl.constexpr):
    """The three words of each step from column ``first`` on, int32 ``[M, S]`` each.

    Steps beyond the codes are 0.
    """
    return (
        _load_words(block_ptr_B, first, 0, SPEC),
        _load_words(block_ptr_B, first, 1, SPEC),
        _load_words(block_ptr_B, first, 2, SPEC),
    )


@triton.jit
def _load_words(block_ptr_B, first, WHICH: tl.constexpr, SPEC: tl.constexpr):
    S: tl.constexpr = SPEC.step // 8
    s_S = tl.arange(0, S)
    # a part of a group of 64 columns, or whole ones
    step_S = first % 64 // 8 + s_S if S < 8 else s_S // 8 * 24 + s_S % 8
    word_SR = ((step_S + WHICH * 8) * 16)[:, None] + tl.arange(0, 16)[None, :]
    word_ptr_B = block_ptr_B.to(tl.pointer_type(tl.int32)) + first // 64 * 384
    word_ptr_BSR = word_ptr_B[:, None, None] + word_SR[None, :, :]
    if SPEC.is_ragged:
        COLS: tl.constexpr = SPEC.scale_offset // 24
        is_code_S = first + s_S * 8 < COLS
        return rows_first(tl.load(word_ptr_BSR, mask=is_code_S[None, :, None], other=0), SPEC)
    else:
        return rows_first(tl.load(word_ptr_BSR), SPEC)


@triton.jit
def load_scales(block_ptr_M, row_M, SPEC: tl.constexpr):
    """The bits of each row's scale, a bfloat16, in both halves, int32 ``[M]``."""
    OFFSET: tl.constexpr = SPEC.scale_offset
    scale_ptr_M = (block_ptr_M + OFFSET).to(tl.pointer_type(tl.uint16)) + row_M % 16
    scale_M = tl.load(scale_ptr_M).to(tl.int32)
    return scale_M | (scale_M << 16)


@triton.jit
def decode_steps(w0_MS, w1_MS, w2_MS, scale_M, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """Weights in ``DTYPE``, ``[M, D]``, exact in float32 and bfloat16.

    D has the order of ``order_steps``.
    """
    M: tl.constexpr = w0_MS.shape[0]
    S: tl.constexpr = w0_MS.shape[1]
    scale_M1 = scale_M[:, None]
    last_MS = (
        ((w0_MS >> 4) & 0x07800780)
        | ((w1_MS >> 8) & 0x00780078)
        | ((w2_MS >> 11) & 0x00070007)
        | ((w2_MS << 1) & -0x7FFF8000)
    )
    KEEP: tl.constexpr = -0x78007801  # 0x87FF87FF: sign, four bits of the exponent, mantissa
    left_MSHJ = tl.join(
        _scaled(w0_MS & KEEP, scale_M1, DTYPE), _scaled(w1_MS & KEEP, scale_M1, DTYPE)
    )
    right_MSHJ = tl.join(_scaled(w2_MS & KEEP, scale_M1, DTYPE), _scaled(last_MS, scale_M1, DTYPE))
    weights_MSHJJ = tl.join(left_MSHJ, right_MSHJ)
    if SPEC.in_registers:
        # four numbers of a step behind each other, the other four half of the depth further on: an
        # mma's thread has these eight
        return tl.reshape(tl.permute(weights_MSHJJ, (0, 4, 1, 3, 2)), (M, 8 * S))
    else:
        return tl.reshape(tl.permute(weights_MSHJJ, (0, 1, 4, 3, 2)), (M, 8 * S))


@triton.jit
def order_steps(x_ND, SPEC: tl.constexpr):
    """The columns' side of a product in the order of depth that ``decode_steps`` gives."""
    if SPEC.in_registers:
        N: tl.constexpr = x_ND.shape[0]
        D: tl.constexpr = x_ND.shape[1]
        return tl.reshape(tl.permute(tl.reshape(x_ND, (N, D // 8, 2, 4)), (0, 2, 1, 3)), (N, D))
    else:
        return x_ND


@triton.jit
def _scaled(pair_MS, scale_M1, DTYPE: tl.constexpr):
    """Both bfloat16 numbers of each word times the row's scale, ``[M, S, 2]``."""
    if HAS_PTX and tl.bfloat16 == DTYPE:
        # compute capability 8.0 has no product of pairs but this; -0 added changes none, not even 0
        scaled_MS = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [pair_MS, scale_M1, -0x7FFF8000],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        low_MS = (scaled_MS & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high_MS = (scaled_MS >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        # the interpreter cuts products of bfloat16
        factor_M1 = (scale_M1 & -0x10000).to(tl.float32, bitcast=True)
        low_MS = ((pair_MS << 16).to(tl.float32, bitcast=True) * factor_M1).to(DTYPE)
        high_MS = ((pair_MS & -0x10000).to(tl.float32, bitcast=True) * factor_M1).to(DTYPE)
    return tl.join(low_MS, high_MS)

"""Tiles of packed int4 and int8 weights: wide loads, codes as floats in registers.

A tile is some blocks of 16 rows, of each one run of its stream of 32-bit words (row r, step s at
word 16 s + r; docs/packed-experts.md). ``IN_REGISTERS``: rows and depth come in an order in which
each thread loads, decodes and multiplies whole words, without exchange; an int4 weight then costs
2.5 instructions in all (4 of mma's 16 rows by 8 columns). Otherwise both have their natural order.
Shapes: B blocks, M = 16 B rows, S steps (words of a row), D depth, N columns (tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.device import HAS_PTX


@triton.jit
def tile_row(m_M, SPEC: tl.constexpr):
    """The row that index ``m_M`` of a tile stands for.

    In registers, indices g and g + 8 of a block are rows 2 g and 2 g + 1: one thread of an mma
    holds both and loads them as 8 bytes.
    """
    if SPEC.in_registers:
        return m_M // 16 * 16 + m_M % 8 * 2 + m_M // 8 % 2
    else:
        return m_M


@triton.jit
def block_offset(block_X, WHICH: tl.constexpr, SPEC: tl.constexpr):
    """Bytes before blocks of the first (0) or second (1) tile; ``block_X`` are the first's.

    Blocks beyond a matrix are its last one.
    """
    LAST: tl.constexpr = (SPEC.rows - 1) // 16
    BYTES: tl.constexpr = SPEC.block_bytes
    if SPEC.paired:
        return (tl.minimum(block_X, LAST) * 2 + WHICH) * BYTES
    else:
        NEXT: tl.constexpr = SPEC.tile_rows // 16
        return tl.minimum(block_X + WHICH * NEXT, LAST) * BYTES


@triton.jit
def wait_for_products():
    """Let no product of the last step be under way when this step's weights are decoded.

    A wgmma reads its weights from registers while it runs. Triton 3.6 waits for what writes the
    same sums only, and lets the next step write these registers (triton-lang/triton issue 9433).
    """
    tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; mov.b32 $0, 0;",
        "=r",
        [],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_words(block_ptr_B, step, S: tl.constexpr, SPEC: tl.constexpr):
    """Words ``step .. step + S`` of the rows of some blocks, int32 ``[M, S]``."""
    word_SR = tl.arange(0, S)[:, None] * 16 + tl.arange(0, 16)[None, :]
    word_ptr_B = block_ptr_B.to(tl.pointer_type(tl.int32)) + step * 16
    return rows_first(tl.load(word_ptr_B[:, None, None] + word_SR[None, :, :]), SPEC)


@triton.jit
def rows_first(words_BSR, SPEC: tl.constexpr):
    """Words of blocks as rows of a tile, ``[M, S]``, in the order of ``tile_row``."""
    M: tl.constexpr = SPEC.tile_rows
    S: tl.constexpr = words_BSR.shape[1]
    if SPEC.in_registers:
        words_BSGH = tl.reshape(words_BSR, (M // 16, S, 8, 2))
        return tl.reshape(tl.permute(words_BSGH, (0, 3, 2, 1)), (M, S))
    else:
        return tl.reshape(tl.permute(words_BSR, (0, 2, 1)), (M, S))


@triton.jit
def load_group(block_ptr_M, row_M, group, SPEC: tl.constexpr):
    """Scales (float32) and zero points (int32) of one group for rows ``row_M``, ``[M]`` each."""
    SCALES: tl.constexpr = SPEC.scale_offset
    ZEROS: tl.constexpr = SPEC.zero_offset
    MIDDLE: tl.constexpr = 1 << (SPEC.bits - 1)
    entry_M = group * 16 + row_M % 16
    scale_ptr_M = (block_ptr_M + SCALES).to(tl.pointer_type(SPEC.scale_dtype))
    scale_M = tl.load(scale_ptr_M + entry_M).to(tl.float32)
    if SPEC.has_zeros:
        zero_M = tl.load(block_ptr_M + ZEROS + entry_M).to(tl.int32)
    else:
        zero_M = tl.full(row_M.shape, MIDDLE, tl.int32)
    return scale_M, zero_M


@triton.jit
def decode_words(words_MS, zero, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """Codes minus ``zero`` (a number or ``[M, 1]``), exact in ``DTYPE``, ``[M, D]``.

    D has the order of ``order_depth``.
    """
    M: tl.constexpr = words_MS.shape[0]
    S: tl.constexpr = words_MS.shape[1]
    if SPEC.bits == 8:
        low_MSP = tl.join(_code(words_MS, zero, 0, DTYPE, 8), _code(words_MS, zero, 8, DTYPE, 8))
        high_MSP = tl.join(_code(words_MS, zero, 16, DTYPE, 8), _code(words_MS, zero, 24, DTYPE, 8))
        codes_MSHP = tl.permute(tl.join(low_MSP, high_MSP), (0, 1, 3, 2))
        return tl.reshape(codes_MSHP, (M, 4 * S))
    else:
        # k = 8 s + 4 high + 2 pair + odd: two codes 16 bits apart are a pair
        even_MSPH = tl.join(_pair(words_MS, zero, 0, DTYPE), _pair(words_MS, zero, 4, DTYPE))
        odd_MSPH = tl.join(_pair(words_MS, zero, 8, DTYPE), _pair(words_MS, zero, 12, DTYPE))
        codes_MSPHO = tl.join(even_MSPH, odd_MSPH)
        if SPEC.in_registers:
            return tl.reshape(tl.permute(codes_MSPHO, (0, 4, 1, 3, 2)), (M, 8 * S))
        else:
            return tl.reshape(tl.permute(codes_MSPHO, (0, 1, 3, 2, 4)), (M, 8 * S))


@triton.jit
def order_depth(x_ND, SPEC: tl.constexpr):
    """The columns' side of a product in the order of depth that ``decode_words`` gives."""
    if SPEC.in_registers and SPEC.bits == 4:
        N: tl.constexpr = x_ND.shape[0]
        D: tl.constexpr = x_ND.shape[1]
        x_NSHPO = tl.reshape(x_ND, (N, D // 8, 2, 2, 2))
        return tl.reshape(tl.permute(x_NSHPO, (0, 4, 1, 2, 3)), (N, D))
    else:
        return x_ND


@triton.jit
def _code(words_MS, zero, SHIFT: tl.constexpr, DTYPE: tl.constexpr, BITS: tl.constexpr):
    """The code at bit ``SHIFT`` of each word, minus the zero point."""
    code_MS = (words_MS >> SHIFT) & ((1 << BITS) - 1)
    # these are the bits of 2**23 + code: a subtraction converts it, at full rate
    biased_MS = (code_MS | 0x4B000000).to(tl.float32, bitcast=True)
    return (biased_MS - (zero + 8388608.0)).to(DTYPE)


@triton.jit
def _pair(words_MS, zero, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """The int4 codes at bits ``SHIFT`` and ``SHIFT + 16``, minus the zero point, ``[M, S, 2]``."""
    if HAS_PTX and tl.float32 != DTYPE:
        # 0x4300 | code is 128 + code in bf16, 0x6400 | code is 1024 + code in f16: two codes take
        # one lop3 and one exact fma instead of two shifts, masks, subtractions and conversions
        IS_BF16: tl.constexpr = tl.bfloat16 == DTYPE
        MAGIC: tl.constexpr = 0x43004300 if IS_BF16 else 0x64006400
        ONE: tl.constexpr = 0x3F803F80 if IS_BF16 else 0x3C003C00
        TYPE: tl.constexpr = "bf16x2" if IS_BF16 else "f16x2"
        # the sign bits are set by exclusive or: their constant would not fit in int32
        minus_zero = (zero | (zero << 16) | MAGIC) ^ -0x7FFF8000
        pair_MS = tl.inline_asm_elementwise(
            "{ .reg .b32 biased; lop3.b32 biased, $1, 0x000F000F, $3, 0xEA; "
            "fma.rn." + TYPE + " $0, biased, $4, $2; }",
            "=r,r,r,r,r",
            [words_MS >> SHIFT, minus_zero, MAGIC, ONE],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        low_MS = (pair_MS & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        high_MS = (pair_MS >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return tl.join(low_MS, high_MS)
    else:
        return tl.join(
            _code(words_MS, zero, SHIFT, DTYPE, 4), _code(words_MS, zero, SHIFT + 16, DTYPE, 4)
        )

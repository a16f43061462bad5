"""Codes of an eight-bit cache as floats, on the way into a product.

The compiler's own conversions take up to five instructions a code and decode attention waits for
them: the reason for inline PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.device import HAS_PTX

# Four int8 to float16, 5 instructions. The bits 0x6400 | n are 1024 + n, 0x6480 is 1152: flipping
# the sign bit adds 128, and the subtraction is exact. (bfloat16 has no bit left for an offset: 8.)
_INT8_TO_F16 = tl.constexpr("""{
    .reg .b32 codes, low, high, offset;
    mov.b32 offset, 0x64806480;
    xor.b32 codes, $2, 0x80808080;
    prmt.b32 low, codes, 0x64646464, 0x4140;
    prmt.b32 high, codes, 0x64646464, 0x4342;
    sub.f16x2 $0, low, offset;
    sub.f16x2 $1, high, offset;
}""")

_E4M3_TO_F16 = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")

# Pairs of neighbouring dims to the even or the odd ones, of two tokens in a register. A byte alone
# in a half is a denormal float16: code + CODE_OFFSET units of 2 ** -24, which products take as they
# are, and what was added is taken off their sums. 1 instruction for the even ones, 2 for the odd.
CODE_OFFSET = tl.constexpr(128)
CODE_UNIT = tl.constexpr(2.0**-24)
_EVEN_CODES = tl.constexpr("lop3.b32 $0, $1, 0x00ff00ff, 0x00800080, 0x6a;")
_ODD_CODES = tl.constexpr("""{
    .reg .b32 odd;
    prmt.b32 odd, $1, 0, 0x4341;
    xor.b32 $0, odd, 0x00800080;
}""")

_EVEN_E4M3 = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $1, $1, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
}""")
_ODD_E4M3 = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $1, $1, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, high;
}""")


@triton.jit
def widen(x, DTYPE: tl.constexpr, IN_PLACE: tl.constexpr):
    """int8, or e4m3 as the uint8 of its bits, exactly as ``DTYPE``; floats are only cast.

    ``IN_PLACE``: the compiler may first bring the codes to where a product wants its operand. It
    is good where a product takes neighbours in memory (keys). Otherwise it would gather single
    bytes (values), and the floats are brought there instead.
    """
    is_int8: tl.constexpr = x.dtype == tl.int8
    if is_int8 or x.dtype == tl.uint8:
        if HAS_PTX and tl.float16 == DTYPE:
            # what is not "pure" is not moved behind a change of layout
            return tl.inline_asm_elementwise(
                _INT8_TO_F16 if is_int8 else _E4M3_TO_F16,
                "=r,=r,r",
                [x],
                dtype=tl.float16,
                is_pure=IN_PLACE,
                pack=4,
            )
        return (x if is_int8 else x.to(tl.float8e4nv, bitcast=True)).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def widen_pairs(x, IS_FP8: tl.constexpr, ODD: tl.constexpr):
    """The even or odd dims of ``x``, int16 with two of them in each, as float16.

    e4m3 exactly; int8 as (code + CODE_OFFSET) * CODE_UNIT, exactly.
    """
    if HAS_PTX:
        codes: tl.constexpr = _ODD_CODES if ODD else _EVEN_CODES
        e4m3: tl.constexpr = _ODD_E4M3 if ODD else _EVEN_E4M3
        return tl.inline_asm_elementwise(
            e4m3 if IS_FP8 else codes, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        byte = (x >> 8 if ODD else x) & 0xFF
        if IS_FP8:
            return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        else:
            return (byte ^ CODE_OFFSET).to(tl.int16).to(tl.float16, bitcast=True)

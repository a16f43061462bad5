"""Codes of an eight-bit or four-bit cache as floats, on the way into a product.

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

# Four bits, two codes a byte. As int8 a code stays in the upper half of its byte, 16 times what it
# is: 1 instruction for four of them, 2 for those of the lower half.
_LOW_TO_INT8 = tl.constexpr("""{
    .reg .b32 upper;
    shl.b32 upper, $1, 4;
    and.b32 $0, upper, 0xf0f0f0f0;
}""")
_HIGH_TO_INT8 = tl.constexpr("and.b32 $0, $1, 0xf0f0f0f0;")

# To float16, 5 instructions for four. Flipping the sign adds 8, or 128 where the code stands for 16
# of itself: 0x64 above makes it 1024 + code + 8, or 1024 + 16 * (code + 8), whose 16th part is
# 64 + code + 8. Both are exact, and so is what is taken off.
_LOW_TO_F16 = tl.constexpr("""{
    .reg .b32 codes, low, high, offset;
    mov.b32 offset, 0x64086408;
    lop3.b32 codes, $2, 0x0f0f0f0f, 0x08080808, 0x6a;
    prmt.b32 low, codes, 0x64646464, 0x4140;
    prmt.b32 high, codes, 0x64646464, 0x4342;
    sub.f16x2 $0, low, offset;
    sub.f16x2 $1, high, offset;
}""")
_HIGH_TO_F16 = tl.constexpr("""{
    .reg .b32 codes, low, high, part, offset;
    mov.b32 part, 0x2c002c00;
    mov.b32 offset, 0xd480d480;
    lop3.b32 codes, $2, 0xf0f0f0f0, 0x80808080, 0x6a;
    prmt.b32 low, codes, 0x64646464, 0x4140;
    prmt.b32 high, codes, 0x64646464, 0x4342;
    fma.rn.f16x2 $0, low, part, offset;
    fma.rn.f16x2 $1, high, part, offset;
}""")

# As denormals: code + 8 in units of CODE_UNIT, those of an upper half in units 16 times as large.
NIBBLE_OFFSET = tl.constexpr(8)
_EVEN_LOW = tl.constexpr("lop3.b32 $0, $1, 0x000f000f, 0x00080008, 0x6a;")
_EVEN_HIGH = tl.constexpr("lop3.b32 $0, $1, 0x00f000f0, 0x00800080, 0x6a;")
_ODD_LOW = tl.constexpr("""{
    .reg .b32 odd;
    shr.u32 odd, $1, 8;
    lop3.b32 $0, odd, 0x000f000f, 0x00080008, 0x6a;
}""")
_ODD_HIGH = tl.constexpr("""{
    .reg .b32 odd;
    shr.u32 odd, $1, 8;
    lop3.b32 $0, odd, 0x00f000f0, 0x00800080, 0x6a;
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
            return _bytes_to_float16(x, _INT8_TO_F16 if is_int8 else _E4M3_TO_F16, IN_PLACE)
        return (x if is_int8 else x.to(tl.float8e4nv, bitcast=True)).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def _bytes_to_float16(x, PTX: tl.constexpr, IN_PLACE: tl.constexpr):
    """``PTX`` makes four float16 of four bytes; ``IN_PLACE`` as in :func:`widen`."""
    # what is not "pure" is not moved behind a change of layout
    return tl.inline_asm_elementwise(
        PTX, "=r,=r,r", [x], dtype=tl.float16, is_pure=IN_PLACE, pack=4
    )


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


@triton.jit
def zero_and_scale(word):
    """The pair of a token and head, an int32 of two bfloat16 with the scale above, as float32."""
    return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def widen_half(x, DTYPE: tl.constexpr, HIGH: tl.constexpr, IN_PLACE: tl.constexpr):
    """The low or the high codes of ``x``, uint8 with two in each, exactly; as :func:`widen`."""
    if HAS_PTX and tl.float16 == DTYPE:
        return _bytes_to_float16(x, _HIGH_TO_F16 if HIGH else _LOW_TO_F16, IN_PLACE)
    else:
        nibble = (x >> 4 if HIGH else x & 15) ^ NIBBLE_OFFSET
        return (nibble.to(tl.int8) - NIBBLE_OFFSET).to(DTYPE)


@triton.jit
def half_as_int8(x, HIGH: tl.constexpr):
    """The low or the high codes of ``x``, uint8 with two in each, times 16, as int8."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            _HIGH_TO_INT8 if HIGH else _LOW_TO_INT8,
            "=r,r",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        return ((x if HIGH else x << 4) & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def widen_half_pairs(x, HIGH: tl.constexpr, ODD: tl.constexpr):
    """The low or high codes of the even or odd bytes of ``x``, int16 with two bytes in each.

    As float16, (code + NIBBLE_OFFSET) * CODE_UNIT, and 16 times that for the high ones, exactly.
    """
    if HAS_PTX:
        low: tl.constexpr = _ODD_LOW if ODD else _EVEN_LOW
        high: tl.constexpr = _ODD_HIGH if ODD else _EVEN_HIGH
        return tl.inline_asm_elementwise(
            high if HIGH else low, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        byte = x >> 8 if ODD else x
        bits = (byte & 0xF0) ^ (16 * NIBBLE_OFFSET) if HIGH else (byte & 15) ^ NIBBLE_OFFSET
        return bits.to(tl.int16).to(tl.float16, bitcast=True)

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

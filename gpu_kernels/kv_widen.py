"""Codes of an eight-bit cache as floats, on the way into a product.

The compiler's own conversions take up to five instructions a code and decode attention waits for
them: the reason for inline PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter has no PTX.
_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)

# Four int8 to bf16, 8 instructions. The bits 0x4300 | n are 128 + n for n < 128, and 0x4380 is 256:
# (0x4300 | low seven bits) - (0x4300 | sign bit) is exact.
_INT8_TO_BF16 = tl.constexpr("""{
    .reg .b32 low01, low23, sign01, sign23;
    prmt.b32 low01, $2, 0x43434343, 0x4140;
    prmt.b32 low23, $2, 0x43434343, 0x4342;
    and.b32 sign01, low01, 0xFF80FF80;
    and.b32 sign23, low23, 0xFF80FF80;
    and.b32 low01, low01, 0xFF7FFF7F;
    and.b32 low23, low23, 0xFF7FFF7F;
    sub.bf16x2 $0, low01, sign01;
    sub.bf16x2 $1, low23, sign23;
}""")

# Four e4m3 to bf16, 10 instructions. A code's exponent and mantissa moved to bf16's places are the
# number times 2**-120, subnormals included; 0x7B80 is 2**120. NaN, which no cache holds, gives 480.
_E4M3_TO_BF16 = tl.constexpr("""{
    .reg .b32 code01, code23, bits01, bits23, power;
    mov.b32 power, 0x7B807B80;
    prmt.b32 code01, $2, 0, 0x1404;
    prmt.b32 code23, $2, 0, 0x3424;
    shr.b32 bits01, code01, 4;
    shr.b32 bits23, code23, 4;
    and.b32 bits01, bits01, 0x07F007F0;
    and.b32 bits23, bits23, 0x07F007F0;
    lop3.b32 bits01, code01, 0x80008000, bits01, 0xEA;
    lop3.b32 bits23, code23, 0x80008000, bits23, 0xEA;
    mul.bf16x2 $0, bits01, power;
    mul.bf16x2 $1, bits23, power;
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
        if _HAS_PTX and tl.bfloat16 == DTYPE:
            # what is not "pure" is not moved behind a change of layout
            return tl.inline_asm_elementwise(
                _INT8_TO_BF16 if is_int8 else _E4M3_TO_BF16,
                "=r,=r,r",
                [x],
                dtype=tl.bfloat16,
                is_pure=IN_PLACE,
                pack=4,
            )
        return (x if is_int8 else x.to(tl.float8e4nv, bitcast=True)).to(DTYPE)
    else:
        return x.to(DTYPE)

"""Vectors of 16 numbers before and after the products of bf12 blocks; addresses are int64.

By loops of Numba's, which leaves so short ones scalar, an expert of Qwen3-30B with 128 tokens takes
a fifth longer.
"""

from typing import Any

from numba import types
from numba.core import cgutils

from cpu_kernels import vector_ir as v
from cpu_kernels.intrinsics import intrinsic
from cpu_kernels.lossless_dot import LINE
from cpu_kernels.packed_layout import BLOCK_ROWS
from cpu_kernels.vector_ir import F32, I16, I32, I64


@intrinsic
def store_bf16(typingctx, floats, factor, to):
    """Write 16 float32 times ``factor`` as bf16, to nearest even; NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        floats, factor, to = args
        number = builder.fmul(
            v.load(builder, floats, F32, BLOCK_ROWS), v.splat(builder, factor, BLOCK_ROWS)
        )
        bits = builder.bitcast(number, v.wide(I32, BLOCK_ROWS))
        high = v.constant(I32, BLOCK_ROWS, 16)
        last = builder.and_(builder.lshr(bits, high), v.constant(I32, BLOCK_ROWS, 1))
        near = builder.add(builder.add(bits, v.constant(I32, BLOCK_ROWS, 0x7FFF)), last)
        quiet = builder.or_(bits, v.constant(I32, BLOCK_ROWS, 0x400000))
        is_nan = builder.fcmp_unordered("uno", number, number)
        upper = builder.lshr(builder.select(is_nan, quiet, near), high)
        v.store(builder, builder.trunc(upper, v.wide(I16, BLOCK_ROWS)), to)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@intrinsic
def scale_rows(typingctx, sums, num_tokens, scales, factor):
    """Multiply each token's 16 sums by the 16 bf16 at ``scales`` and ``factor``, one by one."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, num_tokens, scales, factor = args
        halves = v.load(builder, scales, I16, BLOCK_ROWS)
        scale = v.bf16_to_f32(builder, halves, BLOCK_ROWS)
        scale = builder.fmul(scale, v.splat(builder, factor, BLOCK_ROWS))
        with cgutils.for_range(builder, num_tokens, intp=I64) as loop:
            at = builder.add(sums, builder.mul(loop.index, I64(LINE)))
            v.store(builder, builder.fmul(v.load(builder, at, F32, BLOCK_ROWS), scale), at)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3, types.float32), codegen

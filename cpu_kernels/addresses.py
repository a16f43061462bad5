"""Arrays and records at addresses, for compiled code, and the bits of a float32."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types

from cpu_kernels.intrinsics import intrinsic, jit


def array_at(element: Any) -> Any:
    """(address, length): the C-contiguous array of ``element`` that lies there."""

    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    carray: Any = numba.carray  # type: ignore[attr-defined]

    @jit
    def make_array(address, length):
        return carray(pointer(address), (length,))

    return make_array


def array_of_records(dtype: npt.DTypeLike) -> Any:
    """As :func:`array_at` for a structured numpy type."""
    return array_at(numba.from_dtype(np.dtype(dtype)))


f32_array = array_at(types.float32)
i64_array = array_at(types.int64)
i32_array = array_at(types.int32)
i8_array = array_at(types.int8)
u16_array = array_at(types.uint16)


@intrinsic
def bits_of(typingctx, value):
    """The int32 with the bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(typingctx, bits):
    """The float32 with the bits of an int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen

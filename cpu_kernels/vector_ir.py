"""Words for writing loops of vectors in LLVM's language; addresses are int64, vectors L lanes.

Sums and products stand in the order that we write: LLVM may fuse a multiply with an add, no more.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.isa import host_isa

I64, I32, I16, I8 = (ir.IntType(bits) for bits in (64, 32, 16, 8))
F32, F16 = ir.FloatType(), ir.HalfType()


class _Bfloat(ir.types._BaseFloatType):  # type: ignore[misc]  # llvmlite has no word for it
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def format_constant(self, value: float) -> str:
        raise NotImplementedError("no constants of this type are written")


_Bfloat._create_instance()
BF16 = _Bfloat()
ADDRESSES = types.Array(types.int64, 1, "C")
LANES = host_isa().lanes
CACHE_LINE = 64

_FUSE = ("contract",)


def wide(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def constant(kind: Any, lanes: int, value: float) -> Any:
    return ir.Constant(wide(kind, lanes), [kind(value)] * lanes) if lanes > 1 else kind(value)


def pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def offset(builder: Any, address: Any, num_bytes: int) -> Any:
    return builder.add(address, I64(num_bytes)) if num_bytes else address


def load(builder: Any, address: Any, kind: Any, lanes: int) -> Any:
    """``lanes`` numbers at ``address``, which may be any byte."""
    return builder.load(pointer(builder, address, wide(kind, lanes)), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, pointer(builder, address, value.type), align=1)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """The scalar ``value`` in every lane."""
    if lanes == 1:
        return value
    kind = wide(value.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    mask = ir.Constant(wide(I32, lanes), [I32(0)] * lanes)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), mask)


def pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    """The lanes of ``a`` followed by ``b`` that are listed."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), [I32(lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)


def multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total + a * b, fused where the CPU can."""
    return builder.fadd(total, builder.fmul(a, b, flags=_FUSE), flags=_FUSE)


def accumulate(builder: Any, slot: Any, a: Any, b: Any) -> None:
    """slot += a * b."""
    builder.store(multiply_add(builder, a, b, builder.load(slot, align=4)), slot, align=4)


def bf16_to_f32(builder: Any, bits: Any, lanes: int) -> Any:
    """bf16 is the upper half of a float32: widen and shift."""
    half = builder.zext(bits, wide(I32, lanes))
    return builder.bitcast(builder.shl(half, constant(I32, lanes, 16)), wide(F32, lanes))


def f16_to_f32(builder: Any, bits: Any, lanes: int) -> Any:
    """Exact for finite numbers, denormals too, though the threads flush those of float32."""
    if "f16c" in host_isa().extensions:
        return builder.fpext(builder.bitcast(bits, wide(F16, lanes)), wide(F32, lanes))
    number = wide(I32, lanes)
    all_bits = builder.zext(bits, number)
    rest = builder.and_(all_bits, constant(I32, lanes, 0x7FFF))
    shifted = builder.shl(rest, constant(I32, lanes, 13))
    normal = builder.add(shifted, constant(I32, lanes, (127 - 15) << 23))
    unit = constant(F32, lanes, 2.0**-24)
    tiny = builder.fmul(builder.sitofp(rest, wide(F32, lanes)), unit)
    is_tiny = builder.icmp_unsigned("<", rest, constant(I32, lanes, 1 << 10))
    size = builder.select(is_tiny, builder.bitcast(tiny, number), normal)
    sign = builder.shl(builder.sub(all_bits, rest), constant(I32, lanes, 16))
    return builder.bitcast(builder.or_(size, sign), wide(F32, lanes))


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """LLVM's intrinsic ``name``."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, arguments)


def prefetch(builder: Any, address: Any, *, to_level_1: bool) -> None:
    """Ask for the cache line of ``address``, to the first or the second level of cache.

    An address out of bounds does no harm.
    """
    place = pointer(builder, address, I8)
    read, locality, data = I32(0), I32(3 if to_level_1 else 2), I32(1)
    call(builder, "llvm.prefetch.p0i8", ir.VoidType(), place, read, locality, data)


def dot4(builder: Any, total: Any, codes: Any, x: Any, lanes: int) -> Any:
    """total + the sum of four products of bytes in each int32 lane; exact.

    ``codes`` holds unsigned bytes and ``x`` signed ones, four in each int32 lane.
    """
    if host_isa().has_vnni:
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", total.type, total, codes, x)
    halves = wide(I16, 2 * lanes)
    eight = constant(I16, 2 * lanes, 8)
    codes, x = builder.bitcast(codes, halves), builder.bitcast(x, halves)
    even = builder.and_(codes, constant(I16, 2 * lanes, 255))
    total = _add_pairs(builder, total, even, builder.ashr(builder.shl(x, eight), eight), lanes)
    odd = builder.lshr(codes, eight)
    return _add_pairs(builder, total, odd, builder.ashr(x, eight), lanes)


def dot2(builder: Any, total: Any, a: Any, b: Any, lanes: int) -> Any:
    """total + the sum of two products of bf16 in each lane, for a CPU with :attr:`Isa.has_bf16`."""
    pairs = wide(BF16, 2 * lanes)
    a, b = builder.bitcast(a, pairs), builder.bitcast(b, pairs)
    return call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", total.type, total, a, b)


def _add_pairs(builder: Any, total: Any, a: Any, b: Any, lanes: int) -> Any:
    """total + a[2l] b[2l] + a[2l+1] b[2l+1] of int16: LLVM knows this form as pmaddwd."""
    products = wide(I32, 2 * lanes)
    product = builder.mul(builder.sext(a, products), builder.sext(b, products))
    even, odd = list(range(0, 2 * lanes, 2)), list(range(1, 2 * lanes, 2))
    pair = builder.add(pick(builder, product, product, even), pick(builder, product, product, odd))
    return builder.add(total, pair)


def dot4_of_nibbles(builder: Any, total: Any, codes: Any, x: Any, lanes: int) -> Any:
    """As :func:`dot4` for codes up to 15: sums of two products cannot leave int16."""
    names = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}
    if host_isa().has_vnni or lanes not in names:
        return dot4(builder, total, codes, x, lanes)
    bytes_, halves = wide(I8, 4 * lanes), wide(I16, 2 * lanes)
    pairs = call(
        builder, names[lanes], halves, builder.bitcast(codes, bytes_), builder.bitcast(x, bytes_)
    )
    return _add_pairs(builder, total, pairs, constant(I16, 2 * lanes, 1), lanes)

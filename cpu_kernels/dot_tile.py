"""The innermost loop: dot products of a tile of weight rows with a tile of activation rows.

Written as LLVM vectors, so the order of every sum is ours and not the optimiser's: lane l of an
output's one accumulator adds the products of elements l, l + lanes, l + 2 lanes, ...; the lanes are
folded in halves, then the left-over elements added one by one. An output's bits depend neither on
the tile it was computed in nor on its neighbours, so tiles may be cut as speed wants.

R weight rows, T activation rows of a tile, L lanes of a vector. Addresses are int64.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels.intrinsics import intrinsic
from cpu_kernels.isa import host_isa

LANES = host_isa().lanes
ROWS = 4
TOKENS = 4 if LANES == 16 else 2  # 4 x 4 accumulators need the 32 registers of AVX-512
UNROLL = 2  # vectors of a row per step of the loop
PREFETCH = 512  # bytes: 10 to 40 % faster than none at 2-4 tokens, and than 1024, on Cascade Lake

_FUSE = ("contract",)  # let multiply and add become one FMA where the CPU has it; nothing else
_I64, _I32, _I16, _F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
_ADDRESSES = types.Array(types.int64, 1, "C")


def _wide(kind: Any, lanes: int) -> Any:
    return ir.VectorType(kind, lanes) if lanes > 1 else kind


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load_f32(builder: Any, row: Any, index: Any, lanes: int) -> Any:
    """Elements ``index``, ... of the row at address ``row``; rows may start at any byte."""
    address = builder.add(row, builder.mul(index, _I64(4)))
    return builder.load(_pointer(builder, address, _wide(_F32, lanes)), align=1)


def _load_bf16(builder: Any, row: Any, index: Any, lanes: int) -> Any:
    """As :func:`_load_f32`; bf16 is the upper half of a float32: widen and shift."""
    address = builder.add(row, builder.mul(index, _I64(2)))
    half = builder.load(_pointer(builder, address, _wide(_I16, lanes)), align=1)
    wide = _wide(_I32, lanes)
    sixteen = wide([_I32(16)] * lanes) if lanes > 1 else wide(16)
    return builder.bitcast(builder.shl(builder.zext(half, wide), sixteen), _wide(_F32, lanes))


def _multiply_add(builder: Any, slot: Any, a: Any, b: Any) -> None:
    product = builder.fmul(a, b, flags=_FUSE)
    total = builder.fadd(builder.load(slot, align=4), product, flags=_FUSE)
    builder.store(total, slot, align=4)


def _add_products(
    builder: Any,
    load_w: Any,
    rows: list[Any],
    xs: list[Any],
    slots: list[Any],
    index: Any,
    lanes: int,
) -> None:
    """slots[t * R + r] += rows[r][index...] * xs[t][index...], ``lanes`` elements at once."""
    x_vectors = [_load_f32(builder, x, index, lanes) for x in xs]
    for r, row in enumerate(rows):
        w = load_w(builder, row, index, lanes)
        for t, x in enumerate(x_vectors):
            _multiply_add(builder, slots[t * len(rows) + r], w, x)


def _pick(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(_I32, len(lanes)), [_I32(lane) for lane in lanes])
    return builder.shuffle_vector(a, b, mask)


def _fold_lanes(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sums of all vectors' lanes, in order, packed into as few vectors as hold them.

    Each step adds the upper half of every output's lanes to the lower half. Two vectors share a
    step where there are two: 16 sums of 16 lanes take 30 shuffles instead of 64.
    """
    group = vectors[0].type.count
    while group > 1:
        half = group // 2
        firsts = vectors[::2] if len(vectors) > 1 else vectors
        seconds = vectors[1::2] if len(vectors) > 1 else vectors
        lanes = vectors[0].type.count * (2 if len(vectors) > 1 else 1)
        low = [lane for lane in range(lanes) if lane % group < half]
        high = [lane for lane in range(lanes) if lane % group >= half]
        vectors = [
            builder.fadd(_pick(builder, a, b, low), _pick(builder, a, b, high))
            for a, b in zip(firsts, seconds, strict=True)
        ]
        group = half
    return vectors


def _addresses(builder: Any, context: Any, array: Any, first: Any, count: int) -> list[Any]:
    data = context.make_array(_ADDRESSES)(context, builder, array).data
    places = (builder.add(first, _I64(k)) for k in range(count))
    return [builder.load(builder.gep(data, [place])) for place in places]


def _prefetch(builder: Any, row: Any, index: Any, weight_bytes: int) -> None:
    """Ask for the cache lines PREFETCH bytes further on; an address out of bounds does no harm."""
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    address = builder.add(row, builder.mul(index, _I64(weight_bytes)))
    read, all_levels, data = _I32(0), _I32(3), _I32(1)
    for line in range(0, UNROLL * LANES * weight_bytes, 64):
        ahead = builder.inttoptr(builder.add(address, _I64(PREFETCH + line)), pointer)
        builder.call(hint, [ahead, read, all_levels, data])


def _sum_vectors(
    builder: Any, load_w: Any, weight_bytes: int, rows: list[Any], xs: list[Any], length: Any
) -> tuple[list[Any], Any]:
    """The accumulators [T, R] over all whole vectors of the rows, and where those end."""
    vector = ir.VectorType(_F32, LANES)
    zero = ir.Constant(vector, [_F32(0)] * LANES)
    slots = [cgutils.alloca_once_value(builder, zero) for _ in range(len(rows) * len(xs))]
    begin = _I64(0)
    for unroll in (UNROLL, 1):
        step = _I64(unroll * LANES)
        steps = builder.sdiv(builder.sub(length, begin), step)
        with cgutils.for_range(builder, steps, intp=_I64) as loop:
            index = builder.add(begin, builder.mul(loop.index, step))
            if unroll > 1:
                for row in rows:
                    _prefetch(builder, row, index, weight_bytes)
            for k in range(unroll):
                place = builder.add(index, _I64(k * LANES))
                _add_products(builder, load_w, rows, xs, slots, place, LANES)
        begin = builder.add(begin, builder.mul(steps, step))
    return [builder.load(slot) for slot in slots], begin


def _make_dot_tile(load_w: Any, weight_bytes: int, num_tokens: int) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        row_array, first_row, x_array, first_x, length, out, stride = args
        rows = _addresses(builder, context, row_array, first_row, ROWS)
        xs = _addresses(builder, context, x_array, first_x, num_tokens)
        sums, whole = _sum_vectors(builder, load_w, weight_bytes, rows, xs, length)
        folded = _fold_lanes(builder, sums)
        lanes = folded[0].type.count
        slots = []
        for t in range(num_tokens):
            vector, lane = divmod(t * ROWS, lanes)
            place = builder.add(out, builder.mul(_I64(4 * t), stride))
            part = _pick(builder, folded[vector], folded[vector], list(range(lane, lane + ROWS)))
            builder.store(part, _pointer(builder, place, part.type), align=4)
            first = _pointer(builder, place, _F32)
            slots += [builder.gep(first, [_I64(r)]) for r in range(ROWS)]
        with cgutils.for_range(builder, length, start=whole, intp=_I64) as loop:
            _add_products(builder, load_w, rows, xs, slots, loop.index, 1)
        return context.get_dummy_value()

    def dot_tile(typingctx, rows, row, xs, x, length, out, stride):
        """out[t * stride + r] = rows[row + r] . xs[x + t] for r < ROWS and t < T.

        ``rows`` and ``xs`` are arrays of addresses of rows of ``length`` elements, ``out`` is the
        address of float32.
        """
        i64 = types.int64
        return types.void(_ADDRESSES, i64, _ADDRESSES, i64, i64, i64, i64), codegen

    return intrinsic(dot_tile)


# For each type of weights: one activation row (decode), or TOKENS of them.
dot_tile_bf16_1 = _make_dot_tile(_load_bf16, 2, 1)
dot_tile_bf16 = _make_dot_tile(_load_bf16, 2, TOKENS)
dot_tile_f32_1 = _make_dot_tile(_load_f32, 4, 1)
dot_tile_f32 = _make_dot_tile(_load_f32, 4, TOKENS)

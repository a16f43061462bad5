"""The innermost loop over row-major weights: a tile of weight rows times a tile of tokens.

Written as LLVM vectors, so the order of every sum is ours and not the optimiser's: lane l of an
output's one accumulator adds the products of elements l, l + lanes, l + 2 lanes, ... (of pairs of
elements where both sides are bf16 and the CPU multiplies such pairs); the lanes are folded in
halves, then the left-over elements added one by one. An output's bits depend neither on the tile it
was computed in nor on its neighbours, so tiles may be cut as speed wants.

R weight rows, T tokens of a tile, L lanes of a vector. Addresses are int64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels import vector_ir as v
from cpu_kernels.intrinsics import intrinsic
from cpu_kernels.isa import host_isa
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.vector_ir import F32, I16, I64, LANES

# Rows and tokens of a tile; one token alone has its own. 16 accumulators need the 32 registers of
# AVX-512. Many tokens share the widening of fewer rows.
ROWS, FEW_TOKENS = (4, 4) if LANES == 16 else (4, 2)
MANY_ROWS, MANY_TOKENS = (2, 8) if LANES == 16 else (2, 4)
UNROLL = 2  # vectors of a row per step of the loop
# Bytes ahead in each row, then in the tile that is next. 14 workers, bf16, 2048 x 768: 0.73 of a
# plain read with 512 bytes and an end at the row's, 0.88 with 1,024, 0.92 with 2,048; 4,096 as
# 2,048.
PREFETCH = 2048
IN_PAIRS = host_isa().multiplies_pairs


@dataclass(frozen=True, slots=True)
class _Elements:
    """How one path reads and multiplies: bytes of an element, and elements of a vector."""

    weight_bytes: int
    x_bytes: int
    per_vector: int
    load_w: Callable[[Any, Any, int], Any]  # (builder, address, lanes)
    load_x: Callable[[Any, Any, int], Any]
    multiply: Callable[[Any, Any, Any, Any], Any]  # (builder, w, x, total)


def _load_f32(builder: Any, address: Any, lanes: int) -> Any:
    return v.load(builder, address, F32, lanes)


def _load_bf16(builder: Any, address: Any, lanes: int) -> Any:
    return v.bf16_to_f32(builder, v.load(builder, address, I16, lanes), lanes)


def _load_pairs(builder: Any, address: Any, lanes: int) -> Any:
    return v.load(builder, address, I16, 2 * lanes)


def _multiply_pairs(builder: Any, w: Any, x: Any, total: Any) -> Any:
    return v.dot2(builder, total, w, x, LANES)


def _fused(builder: Any, w: Any, x: Any, total: Any) -> Any:
    return v.multiply_add(builder, w, x, total)


def x_bytes(path: KernelPath) -> int:
    """Bytes of an element of the hidden states that a path's tiles read."""
    return 2 if path.activations == "bf16" and IN_PAIRS else 4


def _elements(path: KernelPath) -> tuple[_Elements, _Elements]:
    """For whole vectors, and for the single elements after them."""
    load_w, size = (_load_bf16, 2) if path.kind.codes == "bf16" else (_load_f32, 4)
    if x_bytes(path) == 4:
        both = _Elements(size, 4, LANES, load_w, _load_f32, _fused)
        return both, both
    pairs = _Elements(2, 2, 2 * LANES, _load_pairs, _load_pairs, _multiply_pairs)
    return pairs, _Elements(2, 2, LANES, _load_bf16, _load_bf16, _fused)


def _at(builder: Any, row: Any, index: Any, element_bytes: int) -> Any:
    return builder.add(row, builder.mul(index, I64(element_bytes)))


def _add_products(
    builder: Any,
    e: _Elements,
    rows: list[Any],
    xs: list[Any],
    slots: list[Any],
    index: Any,
    lanes: int,
) -> None:
    """slots[t * R + r] += rows[r][index...] * xs[t][index...], a vector or one element."""
    x_vectors = [e.load_x(builder, _at(builder, x, index, e.x_bytes), lanes) for x in xs]
    for r, row in enumerate(rows):
        w = e.load_w(builder, _at(builder, row, index, e.weight_bytes), lanes)
        for t, x in enumerate(x_vectors):
            slot = slots[t * len(rows) + r]
            builder.store(e.multiply(builder, w, x, builder.load(slot)), slot)


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
            builder.fadd(v.pick(builder, a, b, low), v.pick(builder, a, b, high))
            for a, b in zip(firsts, seconds, strict=True)
        ]
        group = half
    return vectors


def _addresses(builder: Any, context: Any, array: Any, first: Any, count: int) -> list[Any]:
    data = context.make_array(v.ADDRESSES)(context, builder, array).data
    places = (builder.add(first, I64(k)) for k in range(count))
    return [builder.load(builder.gep(data, [place])) for place in places]


def _prefetch(builder: Any, e: _Elements, rows: list[Any], index: Any, ahead: Any) -> None:
    step_bytes = UNROLL * e.per_vector * e.weight_bytes
    for row in rows:
        address = builder.add(_at(builder, row, index, e.weight_bytes), ahead)
        for line in range(0, step_bytes, v.CACHE_LINE):
            v.prefetch(builder, v.offset(builder, address, line), to_level_1=True)


def _sum_vectors(
    builder: Any,
    e: _Elements,
    rows: list[Any],
    next_rows: list[Any],
    xs: list[Any],
    length: Any,
) -> tuple[list[Any], Any]:
    """The accumulators [T, R] over all whole vectors of the rows, and where those end.

    What lies PREFETCH ahead in a row is asked for, and near its end as much of the row of
    ``next_rows``; of rows shorter than that the same element of that row.
    """
    zero = v.constant(F32, LANES, 0)
    slots = [cgutils.alloca_once_value(builder, zero) for _ in range(len(rows) * len(xs))]
    in_row = builder.sub(length, I64(PREFETCH // e.weight_bytes))
    is_short = builder.icmp_signed("<", in_row, I64(0))
    in_row = builder.select(is_short, I64(0), in_row)
    to_next = builder.mul(in_row, I64(-e.weight_bytes))
    begin = I64(0)
    for end, unroll, asked_rows, ahead in (
        (in_row, UNROLL, rows, I64(PREFETCH)),
        (length, UNROLL, next_rows, to_next),
        (length, 1, [], I64(0)),
    ):
        step = I64(unroll * e.per_vector)
        steps = builder.sdiv(builder.sub(end, begin), step)
        with cgutils.for_range(builder, steps, intp=I64) as loop:
            index = builder.add(begin, builder.mul(loop.index, step))
            _prefetch(builder, e, asked_rows, index, ahead)
            for k in range(unroll):
                place = builder.add(index, I64(k * e.per_vector))
                _add_products(builder, e, rows, xs, slots, place, LANES)
        begin = builder.add(begin, builder.mul(steps, step))
    return [builder.load(slot) for slot in slots], begin


def _store_folded(
    builder: Any, sums: list[Any], num_rows: int, num_tokens: int, out: Any, stride: Any
) -> list[Any]:
    """out[t * stride + r] = the sum of all lanes; returns the places of these outputs, [T, R]."""
    folded = _fold_lanes(builder, sums)
    lanes = folded[0].type.count
    places = []
    for t in range(num_tokens):
        vector, lane = divmod(t * num_rows, lanes)
        address = builder.add(out, builder.mul(I64(4 * t), stride))
        chosen = list(range(lane, lane + num_rows))
        part = v.pick(builder, folded[vector], folded[vector], chosen)
        builder.store(part, v.pointer(builder, address, part.type), align=4)
        first = v.pointer(builder, address, F32)
        places += [builder.gep(first, [I64(r)]) for r in range(num_rows)]
    return places


@intrinsic
def dot_tile(typingctx, path, num_rows, num_tokens, rows, row, xs, x, length, out, stride):
    """out[t * stride + r] = rows[row + r] . xs[x + t] for r < num_rows and t < num_tokens.

    ``path`` and both numbers are literals. ``rows`` and ``xs`` are arrays of addresses of rows of
    ``length`` elements, ``out`` is the address of float32. The ``num_rows`` rows behind those in
    ``rows`` are asked for ahead.
    """
    if not isinstance(path, types.IntegerLiteral):
        return None
    vectors, singles = _elements(PATHS[path.literal_value])
    num_r, num_t = num_rows.literal_value, num_tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, _, row_array, first_row, x_array, first_x, length, out, stride = args
        rows = _addresses(builder, context, row_array, first_row, num_r)
        behind = builder.add(first_row, I64(num_r))
        next_rows = _addresses(builder, context, row_array, behind, num_r)
        xs = _addresses(builder, context, x_array, first_x, num_t)
        sums, whole = _sum_vectors(builder, vectors, rows, next_rows, xs, length)
        places = _store_folded(builder, sums, num_r, num_t, out, stride)
        with cgutils.for_range(builder, length, start=whole, intp=I64) as loop:
            _add_products(builder, singles, rows, xs, places, loop.index, 1)
        return context.get_dummy_value()

    i64, array = types.int64, v.ADDRESSES
    tile = (path, num_rows, num_tokens)
    return types.void(*tile, array, i64, array, i64, i64, i64, i64), codegen


def part_sizes(path: KernelPath) -> tuple[int, int]:
    """Elements of a part of the rows, and of a vector: parts are whole vectors.

    A part of the rows of a tile's tokens takes half of a first level of cache of 32 KB.
    """
    vectors, _ = _elements(path)
    return 16 * 1024 // (MANY_TOKENS * vectors.x_bytes), vectors.per_vector


@intrinsic
def dot_tile_part(typingctx, path, rows, row, xs, x, begin, end, sums):
    """Add the products of elements [begin, end), whole vectors, to the sums of a tile of many.

    ``sums`` is the address of [MANY_TOKENS, MANY_ROWS] vectors. The weights that lie as far ahead
    as the part is long, those of the part after it, are asked for.
    """
    if not isinstance(path, types.IntegerLiteral):
        return None
    vectors, _ = _elements(PATHS[path.literal_value])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row_array, first_row, x_array, first_x, begin, end, sums = args
        rows = _addresses(builder, context, row_array, first_row, MANY_ROWS)
        xs = _addresses(builder, context, x_array, first_x, MANY_TOKENS)
        places = _sum_places(builder, sums)
        slots = [cgutils.alloca_once_value(builder, builder.load(at)) for at in places]
        ahead = builder.mul(builder.sub(end, begin), I64(vectors.weight_bytes))
        steps = builder.sdiv(builder.sub(end, begin), I64(vectors.per_vector))
        with cgutils.for_range(builder, steps, intp=I64) as loop:
            index = builder.add(begin, builder.mul(loop.index, I64(vectors.per_vector)))
            for r in rows:
                next_part = builder.add(_at(builder, r, index, vectors.weight_bytes), ahead)
                v.prefetch(builder, next_part, to_level_1=False)
            _add_products(builder, vectors, rows, xs, slots, index, LANES)
        for slot, at in zip(slots, places, strict=True):
            builder.store(builder.load(slot), at)
        return context.get_dummy_value()

    i64, array = types.int64, v.ADDRESSES
    return types.void(path, array, i64, array, i64, i64, i64, i64), codegen


@intrinsic
def dot_tile_end(typingctx, path, rows, row, xs, x, whole, length, sums, out, stride):
    """As :func:`dot_tile` for a tile of many, whose first ``whole`` elements are in ``sums``."""
    if not isinstance(path, types.IntegerLiteral):
        return None
    _, singles = _elements(PATHS[path.literal_value])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, row_array, first_row, x_array, first_x, whole, length, sums, out, stride = args
        rows = _addresses(builder, context, row_array, first_row, MANY_ROWS)
        xs = _addresses(builder, context, x_array, first_x, MANY_TOKENS)
        loaded = [builder.load(at) for at in _sum_places(builder, sums)]
        places = _store_folded(builder, loaded, MANY_ROWS, MANY_TOKENS, out, stride)
        with cgutils.for_range(builder, length, start=whole, intp=I64) as loop:
            _add_products(builder, singles, rows, xs, places, loop.index, 1)
        return context.get_dummy_value()

    i64, array = types.int64, v.ADDRESSES
    return types.void(path, array, i64, array, i64, i64, i64, i64, i64, i64), codegen


def _sum_places(builder: Any, sums: Any) -> list[Any]:
    first = v.pointer(builder, sums, ir.VectorType(F32, LANES))
    return [builder.gep(first, [I64(k)]) for k in range(MANY_ROWS * MANY_TOKENS)]

"""The innermost loop over packed weights: one block of 16 rows times a tile of tokens.

A lane is a row (see :mod:`cpu_kernels.packed_layout`), so no sum crosses lanes. Sums of int8
products are integers and exact; float sums go over k in four chains, k modulo 4, then over groups.
So an output's bits depend neither on the tile nor on the width of the vectors.

L lanes of a vector, T tokens of a tile, parts: vectors that make up 16 rows.
"""

from typing import Any

from numba import types
from numba.core import cgutils

from cpu_kernels import vector_ir as v
from cpu_kernels.intrinsics import intrinsic
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.lossless_dot import emit_dot
from cpu_kernels.vector_ir import F32, I8, I16, I32, I64, LANES

ROWS = 16
PARTS = ROWS // LANES
STEP_BYTES = 64  # four (int8) or eight (int4) elements of each row
UNROLL = 4  # steps; a group has at least four
CHAINS = 4
# Bytes ahead in the stream of codes, to the second level of cache. 14 workers, four bits, experts
# of 2048 x 768: 0.61 of a plain read with 512, 0.67 with 2,048, 0.74 with 4,096; in a later run
# 0.88 with 4,096 to the first level and 1.03 to the second.
PREFETCH = 4096

# Tokens that share one unpacking of the codes, most first: their sums have to stay in registers.
FULL_TOKENS, PART_TOKENS = {16: (8, 4), 8: (4, 2), 4: (2, 2)}[LANES]
CHAINS_AT_ONCE = {16: 16, 8: 8, 4: 8}[LANES]  # accumulators that leave room for the other values


class _Tile:
    """Emits the code of one tile; the fields are values of the function being built."""

    def __init__(
        self,
        builder: Any,
        path: KernelPath,
        block: Any,
        xs: list[Any],
        groups: Any,
        row_groups: Any,
        next_block: Any,
    ):
        self.builder, self.path, self.block, self.xs, self.groups = builder, path, block, xs, groups
        kind = path.kind
        self.step_elements = STEP_BYTES * 8 // kind.bits // ROWS
        self.group_steps = kind.group // self.step_elements
        code_bytes = self.group_steps * STEP_BYTES
        self.scales = builder.add(block, builder.mul(row_groups, I64(code_bytes)))
        self.zeros = builder.add(self.scales, builder.mul(row_groups, I64(2 * ROWS)))
        self.ahead = self._ahead(row_groups, next_block)

    def _ahead(self, row_groups: Any, next_block: Any) -> tuple[Any, Any, Any]:
        """(steps, near, far): what a step below ``steps`` asks for is ``near`` bytes ahead.

        Of a later step it is ``far``. In whole rows that is PREFETCH, in the block and then in
        ``next_block``. Where only the first groups are read, those of a block and of the one behind
        it are.
        """
        builder, kind = self.builder, self.path.kind
        code_bytes = self.group_steps * STEP_BYTES
        group_bytes = code_bytes + ROWS * (2 + kind.has_zeros)
        is_whole = builder.icmp_signed("==", self.groups, row_groups)
        block = builder.add(builder.mul(row_groups, I64(group_bytes)), I64(63))
        block = builder.and_(block, I64(-64))
        read = builder.mul(self.groups, I64(code_bytes))
        read = builder.select(builder.icmp_signed("==", read, I64(0)), I64(1), read)
        blocks, rest = builder.sdiv(I64(PREFETCH), read), builder.srem(I64(PREFETCH), read)
        near = builder.add(builder.mul(blocks, block), rest)
        far = builder.add(near, builder.sub(block, read))
        steps = builder.sdiv(builder.sub(read, rest), I64(STEP_BYTES))
        in_block = builder.sdiv(builder.sub(block, I64(PREFETCH)), I64(STEP_BYTES))
        past_block = builder.sub(next_block, builder.add(self.block, block))
        return (
            builder.select(is_whole, in_block, steps),
            builder.select(is_whole, I64(PREFETCH), near),
            builder.select(is_whole, builder.add(past_block, I64(PREFETCH)), far),
        )

    def slots(self, kind: Any, *counts: int) -> Any:
        """Places for vectors, nested lists of ``counts``; the optimiser makes registers of them."""
        if not counts:
            return cgutils.alloca_once(self.builder, v.wide(kind, LANES))
        return [self.slots(kind, *counts[1:]) for _ in range(counts[0])]

    def clear(self, slots: Any, kind: Any) -> None:
        if isinstance(slots, list):
            for slot in slots:
                self.clear(slot, kind)
        else:
            self.builder.store(v.constant(kind, LANES, 0), slots)

    def codes(self, step: Any, part: int) -> Any:
        address = self.builder.add(self.block, self.builder.mul(step, I64(STEP_BYTES)))
        return v.load(self.builder, v.offset(self.builder, address, 4 * LANES * part), I32, LANES)

    def nibbles(self, codes: Any) -> list[Any]:
        """The low and the high halves of each byte."""
        mask = v.constant(I32, LANES, 0x0F0F0F0F)
        high = self.builder.lshr(codes, v.constant(I32, LANES, 4))
        return [self.builder.and_(codes, mask), self.builder.and_(high, mask)]

    def scale(self, group: Any, part: int) -> Any:
        """The weights' scales of one group as float32."""
        at = self.builder.add(self.scales, self.builder.mul(group, I64(2 * ROWS)))
        bits = v.load(self.builder, v.offset(self.builder, at, 2 * LANES * part), I16, LANES)
        widen = v.f16_to_f32 if self.path.kind.scales == "f16" else v.bf16_to_f32
        return widen(self.builder, bits, LANES)

    def zero(self, group: Any, part: int) -> Any:
        """The zero points of one group as float32."""
        if not self.path.kind.has_zeros:
            return v.constant(F32, LANES, self.path.kind.middle)
        at = self.builder.add(self.zeros, self.builder.mul(group, I64(ROWS)))
        bits = v.load(self.builder, v.offset(self.builder, at, LANES * part), I8, LANES)
        wide = self.builder.zext(bits, v.wide(I32, LANES))
        return self.builder.sitofp(wide, v.wide(F32, LANES))

    def for_steps(self, group: Any, body: Any, *, prefetches: bool = True) -> None:
        """``body(step, k)`` for the steps of a group, UNROLL a round; asks for codes ahead."""
        builder = self.builder
        first = builder.mul(group, I64(self.group_steps))
        steps, near, far = self.ahead
        with cgutils.for_range(builder, I64(self.group_steps // UNROLL), intp=I64) as loop:
            first_of_round = builder.add(first, builder.mul(loop.index, I64(UNROLL)))
            # a group is whole rounds, and so is PREFETCH: one answer for the steps of a round, but
            # for the one in which a block ends, of which some lines behind the block are asked for
            ahead = builder.select(builder.icmp_signed("<", first_of_round, steps), near, far)
            for k in range(UNROLL):
                step = v.offset(builder, first_of_round, k)
                address = builder.add(self.block, builder.mul(step, I64(STEP_BYTES)))
                if prefetches:
                    v.prefetch(builder, builder.add(address, ahead), to_level_1=False)
                body(step, k)

    def token_float(self, token: int, index: Any, first_byte: Any) -> Any:
        """A float32 of a token's prepared row, in every lane."""
        at = self.builder.add(self.xs[token], first_byte)
        at = self.builder.add(at, self.builder.mul(index, I64(4)))
        return v.splat(self.builder, v.load(self.builder, at, F32, 1), LANES)


def _add_bytes(tile: _Tile, totals: Any) -> None:
    """totals[t][part] += scale * x's scale * sum of (code - zero) * x's code, over all groups."""
    builder, tokens = tile.builder, range(len(tile.xs))
    is_int4 = tile.path.kind.bits == 4
    sums = tile.slots(I32, len(tile.xs), PARTS, 2)  # two chains hide the latency of a product
    columns = builder.mul(tile.groups, I64(tile.path.kind.group))
    sum_bytes = builder.add(columns, builder.mul(tile.groups, I64(4)))

    def x(token: int, step: Any, part_bytes: int) -> Any:
        at = builder.add(tile.xs[token], builder.mul(step, I64(tile.step_elements)))
        word = v.load(builder, v.offset(builder, at, part_bytes), I32, 1)
        return v.splat(builder, word, LANES)

    def add_step(step: Any, k: int) -> None:
        dot = v.dot4_of_nibbles if is_int4 else v.dot4
        for part in range(PARTS):
            codes = tile.codes(step, part)
            for half, bytes_ in enumerate(tile.nibbles(codes) if is_int4 else [codes]):
                chain = half if is_int4 else k % 2
                for t in tokens:
                    slot = sums[t][part][chain]
                    word = x(t, step, 4 * half)
                    builder.store(dot(builder, builder.load(slot), bytes_, word, LANES), slot)

    with cgutils.for_range(builder, tile.groups, intp=I64) as loop:
        tile.clear(sums, I32)
        tile.for_steps(loop.index, add_step)
        for part in range(PARTS):
            scale, zero = tile.scale(loop.index, part), tile.zero(loop.index, part)
            for t in tokens:
                both = builder.add(*(builder.load(slot) for slot in sums[t][part]))
                x_scale = tile.token_float(t, loop.index, columns)
                x_sum = tile.token_float(t, loop.index, sum_bytes)
                exact = builder.fsub(
                    builder.sitofp(both, v.wide(F32, LANES)), builder.fmul(zero, x_sum)
                )
                v.accumulate(builder, totals[t][part], exact, builder.fmul(scale, x_scale))


def _add_floats(tile: _Tile, totals: Any) -> None:
    """totals[t][part] += scale * sum of (code - zero) * x, over all groups.

    With many tokens the chains are added up one after the other, so that fewer sums are under way.
    """
    builder, tokens = tile.builder, range(len(tile.xs))
    is_int4 = tile.path.kind.bits == 4
    sums = tile.slots(F32, len(tile.xs), PARTS, CHAINS)
    zeros = tile.slots(F32, PARTS)
    at_once = max(1, min(CHAINS, CHAINS_AT_ONCE // (len(tile.xs) * PARTS)))

    def add_chain(step: Any, part: int, codes: list[Any], chain: int) -> None:
        zero = builder.load(zeros[part])
        for half, bytes_ in enumerate(codes):
            code = builder.lshr(bytes_, v.constant(I32, LANES, 8 * chain))
            code = builder.and_(code, v.constant(I32, LANES, 255))
            weight = builder.fsub(builder.sitofp(code, v.wide(F32, LANES)), zero)
            k = builder.mul(step, I64(tile.step_elements))
            k = v.offset(builder, k, CHAINS * half + chain)
            for t in tokens:
                x = tile.token_float(t, k, I64(0))
                v.accumulate(builder, sums[t][part][chain], weight, x)

    def add_chains(first: int) -> Any:
        def add_step(step: Any, _: int) -> None:
            for part in range(PARTS):
                codes = tile.codes(step, part)
                halves = tile.nibbles(codes) if is_int4 else [codes]
                for chain in range(first, first + at_once):
                    add_chain(step, part, halves, chain)

        return add_step

    with cgutils.for_range(builder, tile.groups, intp=I64) as loop:
        tile.clear(sums, F32)
        for part in range(PARTS):
            builder.store(tile.zero(loop.index, part), zeros[part])
        for first in range(0, CHAINS, at_once):
            tile.for_steps(loop.index, add_chains(first), prefetches=first == 0)
        for part in range(PARTS):
            scale = tile.scale(loop.index, part)
            for t in tokens:
                a, b, c, d = (builder.load(slot) for slot in sums[t][part])
                group_sum = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
                v.accumulate(builder, totals[t][part], group_sum, scale)


def _emit_groups(tile: _Tile, place: Any) -> None:
    """Store the products of codes in groups where ``place(token, row)`` says."""
    add_products = _add_bytes if tile.path.activations == "int8" else _add_floats
    totals = tile.slots(F32, len(tile.xs), PARTS)
    tile.clear(totals, F32)
    add_products(tile, totals)
    for t, of_token in enumerate(totals):
        for part, total in enumerate(of_token):
            v.store(tile.builder, tile.builder.load(total), place(t, LANES * part))


@intrinsic
def packed_tile(
    typingctx, path, num_tokens, block, next_block, xs, x, num_groups, row_groups, out, stride
):
    """out[t * stride + r] = row r of ``block`` . x of token t, for 16 rows and ``num_tokens``.

    ``path`` and ``num_tokens`` are literals. The block's rows have ``row_groups`` groups, of which
    the first ``num_groups`` are multiplied. ``xs[x + t]`` is the address of a token's prepared row
    of so many: float32, or int8 codes [K], scales [G] and sums of codes [G] as float32; ``out`` is
    the address of float32. The block at ``next_block`` is asked for ahead.
    """
    if not isinstance(path, types.IntegerLiteral):
        return None
    kernel, count = PATHS[path.literal_value], num_tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, _, block, next_block, array, first, num_groups, row_groups, out, stride = args
        data = context.make_array(v.ADDRESSES)(context, builder, array).data
        xs = [builder.load(builder.gep(data, [builder.add(first, I64(t))])) for t in range(count)]

        def place(token: int, row: int) -> Any:
            at = builder.add(out, builder.mul(I64(4 * token), stride))
            return v.offset(builder, at, 4 * row)

        if kernel.kind.is_lossless:
            emit_dot(builder, block, next_block, xs, num_groups, row_groups, place)
        else:
            tile = _Tile(builder, kernel, block, xs, num_groups, row_groups, next_block)
            _emit_groups(tile, place)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(path, num_tokens, i64, i64, v.ADDRESSES, i64, i64, i64, i64, i64), codegen

"""Weight rows times many tokens: the innermost loops over bf16 weights as they lie.

Tokens come in blocks of 16, packed so that a step of the depth reads one run: of each pair of
elements the 16 tokens', one behind the other. Weights are read row by row where they are, and
nothing is laid out anew. Three ways, by what the CPU has: AMX tiles, products of pairs of bf16,
float32. All add up an output's pairs in the order of the depth, however it is cut in parts, so its
bits depend on no neighbour.

R weight rows, B blocks of 16 tokens. Addresses are int64.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels import vector_ir as v
from cpu_kernels.amx import may_use_tiles
from cpu_kernels.intrinsics import intrinsic
from cpu_kernels.isa import host_isa
from cpu_kernels.vector_ir import F32, I8, I32, I64, LANES

TOKENS = 16  # of a block: a row of an AMX tile, a vector of AVX-512
PAIR_BYTES = TOKENS * 4  # of a block, for two elements of the depth
STEP = 32  # elements of the depth that an AMX tile has; depths are multiples of it
STEP_BYTES = STEP // 2 * PAIR_BYTES
SUM_BYTES = TOKENS * 4  # of a weight row with a block
HAS_TILES = may_use_tiles()
# Rows and blocks whose sums are in registers at once: 4 of 8 AMX tiles, 16 of 32 vectors of
# AVX-512, 8 of 16 of AVX2.
ROWS, BLOCKS = (32, 2) if HAS_TILES else (8, 2) if LANES == 16 else (4, 1)
# Of a tile of one block, so that as many sums are under way: 16 tokens of an expert of Qwen3-30B
# take 0.52 ms on two cores instead of 0.60.
LONE_ROWS = 16 if (ROWS, BLOCKS) == (8, 2) else ROWS
A_TILE, B_TILE = 4, 6  # tiles of weights and of tokens; those below are sums
# What ldtilecfg reads: palette 1; bytes of a row, 16 bits each, of 8 tiles of 16; their rows.
TILES = bytes((1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8))
_BYTES = I8.as_pointer()


@intrinsic
def column_tile(typingctx, rows, blocks, w, row_bytes, x, block_bytes, depth, sums, sums_bytes):
    """sums[b, r, t] += w[r] . x[b, t] for ROWS rows and BLOCKS blocks, or LONE_ROWS and one.

    ``rows`` and ``blocks`` are literals. ``w`` is the address of row-major bf16 weights, ``x`` of
    the first block, of which there is one every ``block_bytes``; ``sums`` of float32, the rows of a
    block one behind the other, a block every ``sums_bytes``.
    """
    if not isinstance(blocks, types.IntegerLiteral):
        return None
    num_rows, num_blocks = rows.literal_value, blocks.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(num_rows, num_blocks, *args[2:])
        if HAS_TILES:
            _amx(builder, tile)
        else:
            _vectors(builder, tile)
        return context.get_dummy_value()

    return types.void(rows, blocks, *[types.int64] * 7), codegen


@intrinsic
def begin_tiles(typingctx):
    """Make this thread's AMX tiles 16 rows of 64 bytes; nothing where there are none."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if HAS_TILES:
            kind = ir.ArrayType(I8, len(TILES))
            place = cgutils.alloca_once_value(builder, ir.Constant(kind, bytearray(TILES)))
            v.call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(place, _BYTES))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def end_tiles(typingctx):
    """Give the tiles back."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if HAS_TILES:
            v.call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@dataclass(frozen=True, slots=True)
class _Tile:
    """What is multiplied, and where sums go: addresses and bytes in the compiled code."""

    num_rows: int
    num_blocks: int
    w: Any
    row_bytes: Any
    x: Any
    block_bytes: Any
    depth: Any
    sums: Any
    sums_bytes: Any

    def rows(self, builder: Any, step: int) -> list[Any]:
        """Addresses of every ``step``-th row."""
        return _every(builder, self.w, self.row_bytes, range(0, self.num_rows, step))

    def blocks(self, builder: Any) -> list[Any]:
        return _every(builder, self.x, self.block_bytes, range(self.num_blocks))

    def places(self, builder: Any, step: int) -> list[list[Any]]:
        """Of each block the addresses of every ``step``-th row's sums."""
        return [
            _every(builder, block, I64(SUM_BYTES), range(0, self.num_rows, step))
            for block in _every(builder, self.sums, self.sums_bytes, range(self.num_blocks))
        ]


def _every(builder: Any, address: Any, stride: Any, numbers: range) -> list[Any]:
    return [builder.add(address, builder.mul(stride, I64(n))) for n in numbers]


def _amx(builder: Any, tile: _Tile) -> None:
    """Two tiles of 16 rows each, times one or two blocks."""

    def emit(name: str, number: int, *rest: Any) -> None:
        v.call(builder, f"llvm.x86.{name}", ir.VoidType(), I8(number), *rest)

    def at(address: Any, offset: Any) -> Any:
        return builder.inttoptr(builder.add(address, offset), _BYTES)

    rows, blocks = tile.rows(builder, TOKENS), tile.blocks(builder)
    places = tile.places(builder, TOKENS)
    products = [(r, b) for b in range(len(blocks)) for r in range(len(rows))]
    for number, (r, b) in enumerate(products):
        emit("tileloadd64", number, at(places[b][r], I64(0)), I64(SUM_BYTES))
    steps = builder.sdiv(tile.depth, I64(STEP))
    with cgutils.for_range(builder, steps, intp=I64) as loop:
        in_row = builder.mul(loop.index, I64(2 * STEP))
        in_block = builder.mul(loop.index, I64(STEP_BYTES))
        for r, row in enumerate(rows):
            emit("tileloadd64", A_TILE + r, at(row, in_row), tile.row_bytes)
        for b, block in enumerate(blocks):
            emit("tileloadd64", B_TILE + b, at(block, in_block), I64(PAIR_BYTES))
        for number, (r, b) in enumerate(products):
            emit("tdpbf16ps", number, I8(A_TILE + r), I8(B_TILE + b))
    for number, (r, b) in enumerate(products):
        emit("tilestored64", number, at(places[b][r], I64(0)), I64(SUM_BYTES))


def _vectors(builder: Any, tile: _Tile) -> None:
    """A vector of 16 sums for each row and block; a pair of a row's elements in all lanes."""
    multiply = _pairs if host_isa().has_bf16 else _halves
    rows, blocks = tile.rows(builder, 1), tile.blocks(builder)
    places = tile.places(builder, 1)
    slots = [
        [cgutils.alloca_once_value(builder, v.load(builder, at, F32, TOKENS)) for at in of_block]
        for of_block in places
    ]
    steps = builder.sdiv(tile.depth, I64(2))
    with cgutils.for_range(builder, steps, intp=I64) as loop:
        in_row = builder.mul(loop.index, I64(4))
        in_block = builder.mul(loop.index, I64(PAIR_BYTES))
        xs = [v.load(builder, builder.add(b, in_block), I32, TOKENS) for b in blocks]
        for r, row in enumerate(rows):
            pair = v.splat(builder, v.load(builder, builder.add(row, in_row), I32, 1), TOKENS)
            for x, of_block in zip(xs, slots, strict=True):
                total = multiply(builder, pair, x, builder.load(of_block[r]))
                builder.store(total, of_block[r])
    for of_places, of_slots in zip(places, slots, strict=True):
        for at, slot in zip(of_places, of_slots, strict=True):
            v.store(builder, builder.load(slot), at)


def _pairs(builder: Any, w: Any, x: Any, total: Any) -> Any:
    return v.dot2(builder, total, w, x, TOKENS)


def _halves(builder: Any, w: Any, x: Any, total: Any) -> Any:
    """The first elements of the pairs, then the second ones, as float32."""
    floats, high = v.wide(F32, TOKENS), v.constant(I32, TOKENS, 16)
    upper = v.constant(I32, TOKENS, -65536)
    for part in (lambda p: builder.shl(p, high), lambda p: builder.and_(p, upper)):
        a, b = (builder.bitcast(part(side), floats) for side in (w, x))
        total = v.multiply_add(builder, a, b, total)
    return total

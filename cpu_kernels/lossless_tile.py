"""bf12 weight blocks times many tokens: the innermost loops, and how codes become their operand.

Without its scale a code is a bf16 number, and the 16 rows' pairs of columns are a row of an AMX
tile, or a vector: what three words decode to are four of them. So weights are the right operand
and tokens the left one, in blocks of 16 tokens whose steps of the depth are one run: of each
token 32 numbers, a row of the other tile. Sums are token by token, a vector for the 16 rows.

Three ways, by what the CPU has: AMX tiles, products of pairs of bf16, float32. All add up an
output's pairs in the order of the depth, however it is cut in parts, so its bits depend on no
neighbour. Addresses are int64.
"""

from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels import vector_ir as v
from cpu_kernels.column_tile import A_TILE, B_TILE, HAS_TILES, STEP, TOKENS
from cpu_kernels.intrinsics import intrinsic
from cpu_kernels.isa import host_isa
from cpu_kernels.lossless_dot import LINE, PAIR, last_pair, load_words, step_address
from cpu_kernels.packed_layout import BLOCK_ROWS
from cpu_kernels.vector_ir import F32, I8, I32, I64, LANES

SUMS = TOKENS * LINE  # bytes of the sums of a weight block and a block of tokens
STEP_BYTES = 16 * LINE  # of a step of the depth, of either side
STEP_CODES = 12 * LINE  # bytes of codes that hold a step of a weight block
PAIRS = 4  # vectors that three of words decode to
# Weight blocks and tokens whose sums are in registers at once: 4 of 8 AMX tiles, 16 of 32 vectors
# of AVX-512, 8 of 16 of AVX2.
BLOCKS, TILE_TOKENS = (2, 32) if HAS_TILES else (2, 8) if LANES == 16 else (1, 4)
LONE_TOKENS = min(TOKENS, TILE_TOKENS)  # of a tile of the last block of tokens
UNROLL = 4  # pairs of columns

assert BLOCK_ROWS == TOKENS and STEP * TOKENS * 2 == STEP_BYTES


@intrinsic
def decode_pairs(typingctx, words, num_steps, pairs):
    """The pairs of bf16 of ``num_steps`` steps, whole groups; the others are addresses."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words, num_steps, pairs = args
        with cgutils.for_range(builder, num_steps, intp=I64) as loop:
            loaded = load_words(builder, step_address(builder, words, loop.index), BLOCK_ROWS)
            to = builder.add(pairs, builder.mul(loop.index, I64(PAIRS * LINE)))
            for n, pair in enumerate(_decoded(builder, loaded)):
                v.store(builder, pair, v.offset(builder, to, n * LINE))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


def _decoded(builder: Any, words: list[Any]) -> list[Any]:
    """Four pairs from three words."""
    mask = v.constant(I32, BLOCK_ROWS, PAIR)
    direct = [builder.and_(word, mask) for word in words]
    return [*direct, last_pair(builder, words, BLOCK_ROWS)]


@intrinsic
def lossless_tile(
    typingctx, blocks, tokens, w, w_bytes, x, x_bytes, depth, sums, sums_bytes, ahead, ahead_bytes
):
    """sums[n, t, r] += w[n, r] . x[t] for weight blocks n, each of 16 rows, and ``tokens`` tokens.

    ``blocks`` and ``tokens`` are literals, at most BLOCKS and TILE_TOKENS. ``w`` is the address of
    the first block's pairs, ``x`` of the first block of tokens (or of a token in one, where tiles
    have fewer); there is one every ``w_bytes``, ``x_bytes``. ``sums`` are float32, a weight block's
    every ``sums_bytes``. As many codes as are multiplied are asked for at ``ahead`` (0: none), a
    weight block's every ``ahead_bytes``: memory would be idle while tiles are multiplied.
    """
    if not isinstance(blocks, types.IntegerLiteral):
        return None
    num_blocks, num_tokens = blocks.literal_value, tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(num_blocks, num_tokens, *args[2:])
        if HAS_TILES:
            _amx(builder, tile)
        else:
            _vectors(builder, tile)
        return context.get_dummy_value()

    return types.void(blocks, tokens, *[types.int64] * 9), codegen


@dataclass(frozen=True, slots=True)
class _Tile:
    """What is multiplied, and where sums go: addresses and bytes in the compiled code."""

    num_blocks: int
    num_tokens: int
    w: Any
    w_bytes: Any
    x: Any
    x_bytes: Any
    depth: Any
    sums: Any
    sums_bytes: Any
    ahead: Any
    ahead_bytes: Any

    def weights(self, builder: Any) -> list[Any]:
        """Addresses of the weight blocks."""
        return _every(builder, self.w, self.w_bytes, self.num_blocks)

    def places(self, builder: Any, step: int) -> list[list[Any]]:
        """Of each weight block the addresses of every ``step``-th token's sums."""
        return [
            _every(builder, block, I64(step * LINE), self.num_tokens // step)
            for block in _every(builder, self.sums, self.sums_bytes, self.num_blocks)
        ]

    def ask_ahead(self, builder: Any, step: Any) -> None:
        """For the codes of a step."""
        with builder.if_then(builder.icmp_signed("!=", self.ahead, I64(0)), likely=False):
            first = builder.add(self.ahead, builder.mul(step, I64(STEP_CODES)))
            for at in _every(builder, first, self.ahead_bytes, self.num_blocks):
                for line in range(0, STEP_CODES, LINE):
                    v.prefetch(builder, v.offset(builder, at, line), to_level_1=False)


def _every(builder: Any, address: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(address, builder.mul(stride, I64(n))) for n in range(count)]


def _amx(builder: Any, tile: _Tile) -> None:
    """One or two blocks of tokens, as many of weights."""

    def emit(name: str, number: int, *rest: Any) -> None:
        v.call(builder, f"llvm.x86.{name}", ir.VoidType(), I8(number), *rest)

    def transfer(name: str, number: int, address: Any) -> None:
        emit(name, number, builder.inttoptr(address, I8.as_pointer()), I64(LINE))

    weights = tile.weights(builder)
    tokens = _every(builder, tile.x, tile.x_bytes, tile.num_tokens // TOKENS)
    places = tile.places(builder, TOKENS)
    products = [(n, b) for n in range(len(weights)) for b in range(len(tokens))]
    for number, (n, b) in enumerate(products):
        transfer("tileloadd64", number, places[n][b])
    steps = builder.sdiv(tile.depth, I64(STEP))
    with cgutils.for_range(builder, steps, intp=I64) as loop:
        tile.ask_ahead(builder, loop.index)
        step = builder.mul(loop.index, I64(STEP_BYTES))
        for b, block in enumerate(tokens):
            transfer("tileloadd64", A_TILE + b, builder.add(block, step))
        for n, block in enumerate(weights):
            transfer("tileloadd64", B_TILE + n, builder.add(block, step))
        for number, (n, b) in enumerate(products):
            emit("tdpbf16ps", number, I8(A_TILE + b), I8(B_TILE + n))
    for number, (n, b) in enumerate(products):
        transfer("tilestored64", number, places[n][b])


def _vectors(builder: Any, tile: _Tile) -> None:
    """A vector of 16 sums for each weight block and token; a token's pair in all lanes."""
    has_pairs = host_isa().has_bf16
    operands, multiply = (_as_they_are, _pairs) if has_pairs else (_halves, _floats)
    places = tile.places(builder, 1)
    slots = [
        [
            cgutils.alloca_once_value(builder, v.load(builder, at, F32, BLOCK_ROWS))
            for at in of_block
        ]
        for of_block in places
    ]
    weights = tile.weights(builder)

    def add_pair(x: Any, offset: Any) -> None:
        ws = [
            operands(builder, v.load(builder, builder.add(block, offset), I32, BLOCK_ROWS))
            for block in weights
        ]
        for t in range(tile.num_tokens):
            word = v.load(builder, v.offset(builder, x, t * LINE), I32, 1)
            pair = operands(builder, v.splat(builder, word, BLOCK_ROWS))
            for w, of_block in zip(ws, slots, strict=True):
                builder.store(multiply(builder, w, pair, builder.load(of_block[t])), of_block[t])

    steps = builder.sdiv(tile.depth, I64(STEP))
    rounds = I64(STEP // 2 // UNROLL)
    with cgutils.for_range(builder, steps, intp=I64) as loop:
        tile.ask_ahead(builder, loop.index)
        step = builder.mul(loop.index, I64(STEP_BYTES))
        with cgutils.for_range(builder, rounds, intp=I64) as inner:
            pair = builder.mul(inner.index, I64(UNROLL))
            x = builder.add(builder.add(tile.x, step), builder.mul(pair, I64(4)))
            in_block = builder.add(step, builder.mul(pair, I64(LINE)))
            for n in range(UNROLL):
                add_pair(v.offset(builder, x, 4 * n), v.offset(builder, in_block, n * LINE))
    for of_places, of_slots in zip(places, slots, strict=True):
        for at, slot in zip(of_places, of_slots, strict=True):
            v.store(builder, builder.load(slot), at)


def _as_they_are(builder: Any, pairs: Any) -> list[Any]:
    return [pairs]


def _halves(builder: Any, pairs: Any) -> list[Any]:
    """The first numbers of the pairs, then the second ones, as float32."""
    floats = v.wide(F32, BLOCK_ROWS)
    first = builder.shl(pairs, v.constant(I32, BLOCK_ROWS, 16))
    second = builder.and_(pairs, v.constant(I32, BLOCK_ROWS, -65536))
    return [builder.bitcast(first, floats), builder.bitcast(second, floats)]


def _pairs(builder: Any, w: list[Any], x: list[Any], total: Any) -> Any:
    return v.dot2(builder, total, w[0], x[0], BLOCK_ROWS)


def _floats(builder: Any, w: list[Any], x: list[Any], total: Any) -> Any:
    for a, b in zip(w, x, strict=True):
        total = v.multiply_add(builder, a, b, total)
    return total

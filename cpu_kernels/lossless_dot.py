"""The innermost loop over bf12 weights: one block of 16 rows times a few tokens, in float32.

A lane is a row, as in :mod:`cpu_kernels.packed_tile`, so no sum crosses lanes; sums go over k in
four chains, k modulo 4. Codes have exponents from 2**-126 on (:mod:`cpu_kernels.lossless`): tokens
are multiplied by X_FACTOR before, so that no product becomes a denormal, and sums by the row's
scale afterwards, all exact. A weight costs 2.4 instructions of decoding for 16 rows.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from cpu_kernels import vector_ir as v
from cpu_kernels.addresses import f32_array, float_of, i32_array, u16_array
from cpu_kernels.intrinsics import intrinsic, jit
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.rounding import bf16_bits
from cpu_kernels.vector_ir import F32, I16, I32, I64, LANES
from cpu_kernels.weight_kind import BF12

ROWS = 16
PARTS = ROWS // LANES
LINE = 64
WORDS = 3  # lines of a step, which is eight columns
STEP = 8
STEP_BYTES = WORDS * LINE
STEPS = 8  # of a group
PLANE_BYTES = STEPS * LINE  # of a group's first words, which its second ones follow
GROUP = BF12.group
GROUP_BYTES = ROWS * GROUP * BF12.bits // 8
CHAINS = 4
X_FACTOR = 2.0**64
PREFETCH = 4096  # bytes ahead in the stream of codes, to the second level of cache
TOKENS = {16: 4, 8: 2, 4: 2}[LANES]  # that share one decoding: their sums have to stay in registers
PAIR = 0x87FF87FF - (1 << 32)  # sign, exponent and mantissa of both halves of a word
_UPPER = PAIR & ~0xFFFF


def emit_dot(
    builder: Any,
    block: Any,
    next_block: Any,
    xs: list[Any],
    num_groups: Any,
    row_groups: Any,
    place: Any,
) -> None:
    """Store row r of ``block`` . x of token t at ``place(t, first row of a vector)``.

    Arguments as for ``packed_tile``; exceptions are not among the products.
    """
    scales = builder.add(block, builder.mul(row_groups, I64(GROUP_BYTES)))
    for line in range(2):  # scales and ends, and the first exceptions
        v.prefetch(builder, v.offset(builder, scales, LINE * line), to_level_1=True)
    for first in range(0, len(xs), TOKENS):
        of_tokens = xs[first : first + TOKENS]
        sums = _sums(builder, block, next_block, of_tokens, num_groups, is_first=first == 0)
        for t, of_token in enumerate(sums):
            for part, total in enumerate(of_token):
                at = v.offset(builder, scales, 2 * LANES * part)
                scale = v.bf16_to_f32(builder, v.load(builder, at, I16, LANES), LANES)
                scale = builder.fmul(scale, v.constant(F32, LANES, 1 / X_FACTOR))
                v.store(builder, builder.fmul(total, scale), place(first + t, LANES * part))


def _sums(
    builder: Any, block: Any, next_block: Any, xs: list[Any], num_groups: Any, *, is_first: bool
) -> list[list[Any]]:
    """Of each token and part of the rows the sum of code * x."""
    zero = v.constant(F32, LANES, 0)
    slots = [
        [[cgutils.alloca_once(builder, zero.type) for _ in range(CHAINS)] for _ in range(PARTS)]
        for _ in xs
    ]
    for slot in (slot for token in slots for part in token for slot in part):
        builder.store(zero, slot)
    read = builder.mul(num_groups, I64(GROUP_BYTES))
    behind = builder.sub(next_block, read)  # what is read after this block
    with cgutils.for_range(builder, builder.sdiv(read, I64(STEP_BYTES)), intp=I64) as loop:
        in_block = builder.mul(loop.index, I64(STEP_BYTES))
        if is_first:
            ahead = v.offset(builder, in_block, PREFETCH)
            base = builder.select(builder.icmp_signed("<", ahead, read), block, behind)
            for line in range(WORDS):
                at = v.offset(builder, builder.add(base, ahead), LINE * line)
                v.prefetch(builder, at, to_level_1=False)
        first_x = builder.mul(loop.index, I64(4 * STEP))
        for part in range(PARTS):
            at = v.offset(builder, step_address(builder, block, loop.index), 4 * LANES * part)
            for k, weights in enumerate(decode_step(builder, at, LANES)):
                for x, of_token in zip(xs, slots, strict=True):
                    number = v.load(
                        builder, v.offset(builder, builder.add(x, first_x), 4 * k), F32, 1
                    )
                    slot = of_token[part][k % CHAINS]
                    v.accumulate(builder, slot, weights, v.splat(builder, number, LANES))
    return [[_folded(builder, part) for part in of_token] for of_token in slots]


def _folded(builder: Any, chains: list[Any]) -> Any:
    a, b, c, d = map(builder.load, chains)
    return builder.fadd(builder.fadd(a, b), builder.fadd(c, d))


def step_address(builder: Any, codes: Any, step: Any) -> Any:
    """Of the first words of a step, of which ``codes`` has whole groups."""
    in_group = builder.and_(step, I64(STEPS - 1))
    group = builder.mul(builder.sub(step, in_group), I64(STEP_BYTES))
    return builder.add(builder.add(codes, group), builder.mul(in_group, I64(LINE)))


def load_words(builder: Any, address: Any, lanes: int) -> list[Any]:
    """The three words of a step of ``lanes`` rows."""
    return [
        v.load(builder, v.offset(builder, address, PLANE_BYTES * j), I32, lanes)
        for j in range(WORDS)
    ]


def decode_step(builder: Any, address: Any, lanes: int) -> list[Any]:
    """The codes of eight columns of ``lanes`` rows as float32, 2**-scale of the weights."""
    floats, high = v.wide(F32, lanes), v.constant(I32, lanes, 16)
    upper = v.constant(I32, lanes, _UPPER)
    words = load_words(builder, address, lanes)
    columns = []
    for pair in (*words, last_pair(builder, words, lanes)):
        columns.append(builder.and_(builder.shl(pair, high), upper))
        columns.append(builder.and_(pair, upper))
    return [builder.bitcast(column, floats) for column in columns]


def last_pair(builder: Any, words: list[Any], lanes: int) -> Any:
    """The pair whose bits are spread over the three words."""

    def bits(word: Any, shift: int, mask: int) -> Any:
        by = v.constant(I32, lanes, abs(shift))
        moved = builder.lshr(word, by) if shift > 0 else builder.shl(word, by)
        return builder.and_(moved, v.constant(I32, lanes, mask))

    exponent, upper = bits(words[0], 4, 0x07800780), bits(words[1], 8, 0x00780078)
    lower, sign = bits(words[2], 11, 0x00070007), bits(words[2], -1, 0x80008000 - (1 << 32))
    return builder.or_(builder.or_(exponent, upper), builder.or_(lower, sign))


@intrinsic
def exceptions_at(typingctx, path, row_groups):
    """Bytes from a block's start to its scales, ends and exceptions; 0: the path has none."""
    if not isinstance(path, types.IntegerLiteral):
        return None
    kind = PATHS[path.literal_value].kind

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.mul(args[1], I64(GROUP_BYTES if kind.is_lossless else 0))

    return types.int64(path, types.int64), codegen


@intrinsic
def x_factor(typingctx, path):
    """What prepared rows of float32 are multiplied by: a power of two."""
    if not isinstance(path, types.IntegerLiteral):
        return None
    factor = factor_of(PATHS[path.literal_value])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(F32, factor)

    return types.float32(path), codegen


@intrinsic
def rounds_act(typingctx, path):
    """Whether what a product reads is rounded to bf16."""
    if not isinstance(path, types.IntegerLiteral):
        return None
    rounds = PATHS[path.literal_value].activations == "bf16"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(ir.IntType(1), int(rounds))

    return types.boolean(path), codegen


@jit
def as_operand(path, number):
    """A float32 as prepared rows of act have it, where these are float32."""
    lifted = number * x_factor(path)
    return float_of(bf16_bits(lifted)) if rounds_act(path) else lifted


def factor_of(path: KernelPath) -> float:
    return X_FACTOR if path.kind.is_lossless else 1.0


@jit
def add_exceptions(behind, xs, num_xs, num_cols, out, stride):
    """out[t * stride + r] += weight * x for the exceptions among the first ``num_cols`` columns.

    ``behind`` is the address of a block's scales, ``xs`` has those of prepared rows.
    """
    ends = u16_array(behind + 32, ROWS)
    if ends[ROWS - 1] == 0:
        return
    entries = i32_array(behind + LINE, ends[ROWS - 1])
    n = 0
    for r in range(ROWS):
        while n < ends[r]:
            column, weight = entries[n] & 0xFFFF, float_of(np.int32(entries[n] & -65536))
            n += 1
            if column >= num_cols:
                continue
            for t in range(num_xs):
                x = f32_array(xs[t], column + 1)[column] * np.float32(1 / X_FACTOR)
                f32_array(out + 4 * (t * stride + r), 1)[0] += weight * x

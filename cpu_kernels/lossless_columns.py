"""Blocks of bf12 weights times tokens in packed blocks, and how tokens are packed.

T tokens, in blocks of 16; K' depth, a multiple of 64. Tokens' numbers are bf16, multiplied by 2**64
(LIFT), since codes without their scale are from 2**-126 to 2**-112; a row's sums are multiplied by
its scale and 2**-64. All of it is exact.
"""

from typing import Any

import numba
import numpy as np

from cpu_kernels.addresses import f32_array, float_of, i32_array, u16_array
from cpu_kernels.column_tile import HAS_TILES, STEP, TOKENS, begin_tiles, end_tiles
from cpu_kernels.intrinsics import jit
from cpu_kernels.lossless_dot import GROUP, GROUP_BYTES, LINE, X_FACTOR
from cpu_kernels.lossless_tile import (
    BLOCKS,
    LONE_TOKENS,
    PAIRS,
    STEP_BYTES,
    SUMS,
    TILE_TOKENS,
    decode_pairs,
    lossless_tile,
)
from cpu_kernels.lossless_vectors import scale_rows, store_bf16
from cpu_kernels.packed_layout import BLOCK_ROWS

literally: Any = numba.literally  # type: ignore[attr-defined]
LIFT, LOWER = np.float32(X_FACTOR), np.float32(1 / X_FACTOR)
BLOCK_BYTES = STEP_BYTES // STEP  # of a block of tokens or of pairs, for each column
CODE_BYTES = GROUP_BYTES // GROUP  # of a block, for each column
# Columns that all rows and tokens pass before the next. Without AMX, 128 rows of 2,048 columns and
# 16 tokens: 347 GFLOP/s a core with 1,024, 335 with 512, 290 with 256.
DEPTH = 512 if HAS_TILES else 1024
PART_BYTES = DEPTH * BLOCK_BYTES  # of a block's pairs


@jit
def pack_row(x, depth, lane, block):
    """Make the float32 row at ``x``, of bf16 numbers, token ``lane`` of a block; ``x`` 0: zeros."""
    for step in range(depth // STEP):
        to = block + step * STEP_BYTES + lane * LINE
        if x == 0:
            f32_array(to, LINE // 4)[:] = 0
        else:
            from_step = x + 4 * step * STEP
            store_bf16(from_step, np.float32(1), to)
            store_bf16(from_step + LINE, np.float32(1), to + LINE // 2)


@jit
def store_rows(floats, row, lane, block):
    """Make 16 rows of act, from ``row`` on, numbers of token ``lane`` of a block."""
    store_bf16(floats, LIFT, block + row // STEP * STEP_BYTES + lane * LINE + row % STEP * 2)


@jit
def multiply_lossless(w, block_bytes, num_w, num_next, x, num_x, depth, sums, pairs):
    """sums[n, t, r] = weight block n's row r . token t, but for scale and exceptions.

    There are ``num_w`` weight blocks, ``block_bytes`` apart, and ``num_x`` blocks of tokens;
    ``pairs`` is room for PART_BYTES of each weight block. Part by part of the depth: blocks are
    decoded once, and while their pairs pass, a block of tokens' part stays in the first level of
    cache. Meanwhile the next part's codes are asked for, and in the last one those of ``num_next``
    blocks behind.
    """
    f32_array(sums, num_w * num_x * SUMS // 4)[:] = 0
    begin_tiles()
    for k in range(0, depth, DEPTH):
        part = min(DEPTH, depth - k)
        for n in range(num_w):
            codes = w + n * block_bytes + k * CODE_BYTES
            decode_pairs(codes, part // (2 * PAIRS), pairs + n * PART_BYTES)
        ahead, num_ahead = w + (k + DEPTH) * CODE_BYTES, num_w
        if k + DEPTH >= depth:
            ahead, num_ahead = w + num_w * block_bytes, min(num_next, num_w)
        tokens, x_bytes = x + k * BLOCK_BYTES, depth * BLOCK_BYTES
        asked = (ahead, block_bytes, num_ahead)
        multiply_part(pairs, num_w, tokens, num_x, x_bytes, part, sums, asked)
    end_tiles()


@jit
def multiply_part(pairs, num_w, x, num_x, x_bytes, part, sums, asked):
    """sums[n, t, r] += weight block n's pairs . token t.

    ``asked``: codes to ask for, their address, bytes from block to block and number of blocks.
    """
    whole = num_x * TOKENS // TILE_TOKENS * TILE_TOKENS
    sums_bytes = num_x * SUMS
    for t in range(0, whole, TILE_TOKENS):
        at, to = x + t // TOKENS * x_bytes + t % TOKENS * LINE, sums + t * LINE
        ahead = asked if t == 0 else (0, 0, 0)
        multiply_tokens(TILE_TOKENS, pairs, num_w, at, x_bytes, part, to, sums_bytes, ahead)
    for t in range(whole, num_x * TOKENS, LONE_TOKENS):
        at, to = x + t // TOKENS * x_bytes, sums + t * LINE
        ahead = asked if t == 0 else (0, 0, 0)
        multiply_tokens(LONE_TOKENS, pairs, num_w, at, x_bytes, part, to, sums_bytes, ahead)


@jit
def multiply_tokens(tokens, pairs, num_w, x, x_bytes, part, sums, sums_bytes, asked):
    """As above for the tokens of one tile, a literal number."""
    literally(tokens)
    first, apart, num_ahead = asked
    whole = num_w // BLOCKS * BLOCKS
    for n in range(0, whole, BLOCKS):
        w, to = pairs + n * PART_BYTES, sums + n * sums_bytes
        ahead = first + n * apart if n < num_ahead else 0
        lossless_tile(BLOCKS, tokens, w, PART_BYTES, x, x_bytes, part, to, sums_bytes, ahead, apart)
    for n in range(whole, num_w):
        w, to = pairs + n * PART_BYTES, sums + n * sums_bytes
        ahead = first + n * apart if n < num_ahead else 0
        lossless_tile(1, tokens, w, PART_BYTES, x, x_bytes, part, to, sums_bytes, ahead, apart)


@jit
def finish_block(block, x, num_x, depth, sums):
    """Multiply the sums of one weight block by its rows' scales and add its exceptions."""
    behind = block + depth * CODE_BYTES
    scale_rows(sums, num_x * TOKENS, behind, LOWER)
    ends = u16_array(behind + LINE // 2, BLOCK_ROWS)
    if ends[BLOCK_ROWS - 1] == 0:
        return
    products = f32_array(sums, num_x * TOKENS * BLOCK_ROWS)
    entries = i32_array(behind + LINE, ends[BLOCK_ROWS - 1])
    n = 0
    for r in range(BLOCK_ROWS):
        while n < ends[r]:
            column, value = entries[n] & 0xFFFF, float_of(np.int32(entries[n] & -65536))
            add_exception(column, value, x, num_x, depth, products[r:])
            n += 1


@jit
def add_exception(column, value, x, num_x, depth, sums):
    """sums[t * 16] += value * x[t, column]."""
    for b in range(num_x):
        at = x + b * depth * BLOCK_BYTES + column // STEP * STEP_BYTES
        numbers = u16_array(at, TOKENS * STEP)
        for t in range(TOKENS):
            lifted = float_of(np.int32(numbers[t * STEP + column % STEP]) << 16)
            sums[(b * TOKENS + t) * BLOCK_ROWS] += lifted * LOWER * value

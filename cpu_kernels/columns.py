"""Rows of bf16 weights times tokens in packed blocks, and how tokens are packed.

T tokens, in blocks of 16; K depth, a multiple of 32; R rows, LONE_ROWS or more.
"""

from cpu_kernels.addresses import i32_array
from cpu_kernels.column_tile import (
    BLOCKS,
    LONE_ROWS,
    PAIR_BYTES,
    ROWS,
    TOKENS,
    begin_tiles,
    column_tile,
    end_tiles,
)
from cpu_kernels.dense_stage import bf16_bits
from cpu_kernels.intrinsics import jit

BLOCK_BYTES = PAIR_BYTES // 2  # of a block, for each element of the depth


@jit
def bf16_pair(first, second):
    """Both float32, rounded to bf16, in one int32."""
    return bf16_bits(second) | ((bf16_bits(first) >> 16) & 0xFFFF)


@jit
def pack_row(x, lane, block):
    """Make the float32 array ``x``, rounded to bf16, token ``lane`` of the block at ``block``."""
    pairs = i32_array(block, len(x) // 2 * TOKENS)
    for k in range(len(x) // 2):
        pairs[k * TOKENS + lane] = bf16_pair(x[2 * k], x[2 * k + 1])


@jit
def multiply_columns(w, row_bytes, num_rows, x, num_blocks, depth, out, out_bytes):
    """out[r, t] = w[r] . x[t], float32 at ``out``, a row of all blocks' tokens every ``out_bytes``.

    ``w`` is the address of the first row, ``x`` of packed blocks. The last rows may be computed
    twice, with the same result, where a tile ends beyond them.
    """
    block_bytes = depth * BLOCK_BYTES
    whole = num_blocks // BLOCKS * BLOCKS
    begin_tiles()
    for begin in range(0, num_rows, ROWS):
        row = min(begin, num_rows - ROWS)
        for block in range(0, whole, BLOCKS):
            rows, blocks = w + row * row_bytes, x + block * block_bytes
            to = out + row * out_bytes + block * TOKENS * 4
            column_tile(ROWS, BLOCKS, rows, row_bytes, blocks, block_bytes, depth, to, out_bytes)
    if whole < num_blocks:
        blocks, to = x + whole * block_bytes, out + whole * TOKENS * 4
        for begin in range(0, num_rows, LONE_ROWS):
            row = min(begin, num_rows - LONE_ROWS)
            rows, at = w + row * row_bytes, to + row * out_bytes
            column_tile(LONE_ROWS, 1, rows, row_bytes, blocks, block_bytes, depth, at, out_bytes)
    end_tiles()

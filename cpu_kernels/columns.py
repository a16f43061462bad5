"""Rows of bf16 weights times tokens in packed blocks, and how tokens are packed.

T tokens, in blocks of 16; K depth, a multiple of 32; R rows, a multiple of 32.
"""

from cpu_kernels.addresses import bits_of, f32_array, i32_array
from cpu_kernels.column_tile import (
    BLOCKS,
    HAS_TILES,
    LONE_ROWS,
    PAIR_BYTES,
    ROWS,
    SUM_BYTES,
    TOKENS,
    begin_tiles,
    column_tile,
    end_tiles,
)
from cpu_kernels.intrinsics import jit
from cpu_kernels.rounding import bf16_pair

BLOCK_BYTES = PAIR_BYTES // 2  # of a block, for each element of the depth
# Elements of the depth that all rows and tokens pass before the next. By AMX tiles, 14336 x 4096
# with 512 tokens and 14 threads: 8.8 TFLOP/s, 7.9 with the whole depth. Without AMX 1,024 are the
# best or within a tenth; 512, which 768 is no multiple of, lose a third there with 32 tokens.
DEPTH = 512 if HAS_TILES else 1024


@jit
def pack_row(x, x_bytes, depth, lane, block):
    """Make the row at ``x``, of bf16 numbers in ``x_bytes`` each, token ``lane`` of a block.

    ``x`` 0: zeros. ``block`` is the block's address.
    """
    pairs = i32_array(block, depth // 2 * TOKENS)
    if x == 0:
        for k in range(depth // 2):
            pairs[k * TOKENS + lane] = 0
    elif x_bytes == 2:
        words = i32_array(x, depth // 2)
        for k in range(depth // 2):
            pairs[k * TOKENS + lane] = words[k]
    else:
        floats = f32_array(x, depth)
        for k in range(depth // 2):
            pairs[k * TOKENS + lane] = bf16_pair(bits_of(floats[2 * k]), bits_of(floats[2 * k + 1]))


@jit
def multiply_columns(w, row_bytes, num_rows, apart, num_runs, x, num_blocks, depth, sums):
    """sums[b, r, t] = w[r] . x[b, t], float32 at ``sums``; ``w`` is the address of the first row.

    There are ``num_runs`` runs of ``num_rows`` rows, ``apart`` bytes from one to the next. ``x`` is
    the address of packed blocks. Part by part of the depth: while rows pass, their tokens' part
    stays in the first level of cache, and all parts of tokens in the second for the other runs.
    """
    block_bytes, run_bytes = depth * BLOCK_BYTES, num_rows * SUM_BYTES
    sums_bytes = num_runs * run_bytes
    whole = num_blocks // BLOCKS * BLOCKS
    f32_array(sums, num_blocks * sums_bytes // 4)[:] = 0
    begin_tiles()
    for k in range(0, depth, DEPTH):
        part = min(DEPTH, depth - k)
        for block in range(0, num_blocks, BLOCKS):
            xs = x + block * block_bytes + k * BLOCK_BYTES
            for run in range(num_runs):
                ws = w + run * apart + 2 * k
                to = sums + block * sums_bytes + run * run_bytes
                if block < whole:
                    for r in range(0, num_rows, ROWS):
                        rows, at = ws + r * row_bytes, to + r * SUM_BYTES
                        column_tile(
                            ROWS, BLOCKS, rows, row_bytes, xs, block_bytes, part, at, sums_bytes
                        )
                else:
                    for r in range(0, num_rows, LONE_ROWS):
                        rows, at = ws + r * row_bytes, to + r * SUM_BYTES
                        column_tile(
                            LONE_ROWS, 1, rows, row_bytes, xs, block_bytes, part, at, sums_bytes
                        )
    end_tiles()

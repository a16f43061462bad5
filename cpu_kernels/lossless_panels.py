"""bf12 experts with many tokens, by blocks of weights and of tokens: the parts of a stage.

Tokens of such an expert are packed in blocks of 16, one expert's behind the other's, and act comes
as such blocks: w2 reads them as w13 reads x. Sums are token by token, of 16 rows each.
"""

from cpu_kernels.activations import CHUNK, activate
from cpu_kernels.addresses import f32_array, i32_array
from cpu_kernels.column_panels import num_blocks, own_blocks
from cpu_kernels.column_tile import STEP, TOKENS
from cpu_kernels.expert_parts import add_bias, add_rows
from cpu_kernels.intrinsics import jit
from cpu_kernels.lossless_columns import (
    BLOCK_BYTES,
    PART_BYTES,
    finish_block,
    multiply_lossless,
    pack_row,
    store_rows,
)
from cpu_kernels.lossless_dot import GROUP, LINE
from cpu_kernels.lossless_tile import STEP_BYTES, SUMS
from cpu_kernels.packed_layout import BLOCK_ROWS
from cpu_kernels.routes import routed_pairs

WEIGHT_BLOCKS = 8  # that are decoded for all tokens to pass: of w13 four of gate, four of up
TOKEN_BLOCKS = 32  # whose sums wait for their activation
# A worker's room: sums, then pairs.
SUMS_BYTES = WEIGHT_BLOCKS * TOKEN_BLOCKS * SUMS
LOSSLESS_ROOM_BYTES = SUMS_BYTES + WEIGHT_BLOCKS * PART_BYTES

assert CHUNK == BLOCK_ROWS and GROUP % STEP == 0


@jit
def padded_depth(cols):
    """Columns of packed blocks, of weights and of tokens."""
    return (cols + GROUP - 1) // GROUP * GROUP


@jit
def pack_lifted(job, worker, num_workers):
    """One worker's blocks of x, from prepared rows; a token that is missing is zeros."""
    tokens, _ = routed_pairs(job, worker)
    depth = padded_depth(job.hidden)
    for first, last, block in own_blocks(job, worker, num_workers):
        at = job.x_blocks + block * depth * BLOCK_BYTES
        for lane in range(TOKENS):
            pair = first + lane
            x = job.x_rows + tokens[pair] * job.x_row_bytes if pair < last else 0
            pack_row(x, depth, lane, at)


@jit
def lossless_room(job, worker):
    """Addresses of a worker's sums and pairs."""
    sums = job.column_sums + worker * LOSSLESS_ROOM_BYTES
    return sums, sums + SUMS_BYTES


@jit
def gate_up_lossless(job, block_bytes, place, first, last, block, blocks, worker):
    """act of one expert's weight blocks ``first`` to ``last``.

    ``blocks`` from ``block`` on are its tokens.
    """
    sums, pairs = lossless_room(job, worker)
    depth, act_bytes = padded_depth(job.hidden), padded_depth(job.width) * BLOCK_BYTES
    for weights in range(first, last, WEIGHT_BLOCKS // 2):
        w = job.w13 + place * job.w13_stride + 2 * weights * block_bytes
        num_w = 2 * min(WEIGHT_BLOCKS // 2, last - weights)
        num_next = 2 * (last - weights) - num_w
        for begin in range(block, block + blocks, TOKEN_BLOCKS):
            num_x = min(TOKEN_BLOCKS, block + blocks - begin)
            x = job.x_blocks + begin * depth * BLOCK_BYTES
            act = job.act_blocks + begin * act_bytes
            multiply_lossless(w, block_bytes, num_w, num_next, x, num_x, depth, sums, pairs)
            for n in range(num_w):
                finish_block(w + n * block_bytes, x, num_x, depth, sums + n * num_x * SUMS)
            for n in range(0, num_w, 2):
                row, gate = (weights + n // 2) * BLOCK_ROWS, sums + n * num_x * SUMS
                activate_lossless(job, place, row, num_x, gate, act)


@jit
def activate_lossless(job, place, row, num_x, gate, act):
    """16 rows of act of blocks of tokens, from their sums of gate and up; spoils these."""
    num_tokens, up = num_x * TOKENS, gate + num_x * SUMS
    act_bytes = padded_depth(job.width) * BLOCK_BYTES
    num_rows = min(BLOCK_ROWS, job.width - row)
    for half, at in enumerate((gate, up)):
        products = f32_array(at, num_tokens * BLOCK_ROWS).reshape(num_tokens, BLOCK_ROWS)
        bias_row = half * job.width + row
        add_bias(job, job.b13, place, 2 * job.width, bias_row, products, num_tokens, num_rows)
    for t in range(num_tokens):
        at = gate + t * LINE
        activate(job.activation, job.limit, job.alpha, at, up + t * LINE, at)
        store_rows(at, row, t % TOKENS, act + t // TOKENS * act_bytes)
    if row + BLOCK_ROWS >= job.width:
        for b in range(num_x):
            clear_pads(job, act + b * act_bytes)


@jit
def clear_pads(job, block):
    """Make numbers of act behind the last weight block zeros, in one block of tokens."""
    for row in range(
        (job.width + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS, padded_depth(job.width), BLOCK_ROWS
    ):
        for t in range(TOKENS):
            at = block + row // STEP * STEP_BYTES + t * LINE + row % STEP * 2
            i32_array(at, BLOCK_ROWS // 2)[:] = 0


@jit
def down_lossless(job, block_bytes, place, begin, end, pair, last_pair, block, worker):
    """out[:, weight blocks begin to end] += weight * down of one expert's pairs.

    These are ``pair`` to ``last_pair``; ``block`` is the first one of their act.
    """
    sums, pairs = lossless_room(job, worker)
    depth, routed = padded_depth(job.width), routed_pairs(job, worker)
    for weights in range(begin, end, WEIGHT_BLOCKS):
        num_w = min(WEIGHT_BLOCKS, end - weights)
        w = job.w2 + place * job.w2_stride + weights * block_bytes
        for first in range(pair, last_pair, TOKEN_BLOCKS * TOKENS):
            num_tokens = min(TOKEN_BLOCKS * TOKENS, last_pair - first)
            num_x = num_blocks(num_tokens)
            act = job.act_blocks + (block + (first - pair) // TOKENS) * depth * BLOCK_BYTES
            num_next = end - weights - num_w
            multiply_lossless(w, block_bytes, num_w, num_next, act, num_x, depth, sums, pairs)
            for n in range(num_w):
                of_block = sums + n * num_x * SUMS
                finish_block(w + n * block_bytes, act, num_x, depth, of_block)
                add_down_bias(job, place, weights + n, num_tokens, of_block)
            for t in range(num_tokens):
                at = sums + t * LINE
                add_lossless(job, routed, first + t, weights, num_w, at, num_x * SUMS)


@jit
def add_down_bias(job, place, block, num_tokens, sums):
    """To the sums of a block of w2."""
    row = block * BLOCK_ROWS
    products = f32_array(sums, num_tokens * BLOCK_ROWS).reshape(num_tokens, BLOCK_ROWS)
    num_rows = min(BLOCK_ROWS, job.hidden - row)
    add_bias(job, job.b2, place, job.hidden, row, products, num_tokens, num_rows)


@jit
def add_lossless(job, routed, pair, block, num_w, sums, sums_bytes):
    """out[token of the pair, rows of num_w blocks] += weight * its sums, a block's every so many.

    All blocks of a token at a time: the next token's row of out is in another page.
    """
    tokens, weights = routed
    to = job.out + 4 * (tokens[pair] * job.hidden + block * BLOCK_ROWS)
    for n in range(num_w):
        products, out = sums + n * sums_bytes, to + n * LINE
        num_rows = job.hidden - (block + n) * BLOCK_ROWS
        if num_rows >= BLOCK_ROWS:
            of_block = f32_array(products, BLOCK_ROWS)
            add_rows(weights[pair], of_block, f32_array(out, BLOCK_ROWS))
        else:
            add_rows(weights[pair], f32_array(products, num_rows), f32_array(out, num_rows))

"""bf16 experts with many tokens, by tiles of weight rows and packed tokens: the parts of a stage.

The tokens of such an expert are packed in blocks of 16, one expert's behind the other's, and act
comes as such blocks: w2 reads them as w13 reads x. P pairs (token, expert).
"""

from cpu_kernels.activations import CHUNK, activate
from cpu_kernels.addresses import f32_array, i32_array
from cpu_kernels.column_tile import (
    HAS_TILES,
    LONE_ROWS,
    PAIR_BYTES,
    ROWS,
    STEP,
    SUM_BYTES,
    TOKENS,
)
from cpu_kernels.columns import BLOCK_BYTES, DEPTH, multiply_columns, pack_row
from cpu_kernels.expert_job import PANEL_ROWS, PANEL_TOKENS
from cpu_kernels.expert_parts import add_bias, add_weighted, room_of
from cpu_kernels.intrinsics import jit
from cpu_kernels.kernel_paths import KernelPath
from cpu_kernels.rounding import bf16_bits, bf16_pair
from cpu_kernels.routes import routed_experts, routed_pairs

UNIT = 32  # rows of weights that are dealt out at a time: a multiple of every tile's
SUM_ROWS = 2 * UNIT  # whose sums wait for their activation
SUM_BLOCKS = 32  # of tokens, likewise
SUMS_BYTES = 2 * SUM_ROWS * SUM_BLOCKS * SUM_BYTES  # a worker's room for them, gate's and up's
# A token costs here so much less than row by row. ms of 64 more tokens of an expert of Qwen3-30B:
# with AMX 0.08 and 0.47, with products of bf16 pairs alone 0.70 and 0.91.
CHEAPER = 6 if HAS_TILES else 1

assert CHUNK == TOKENS == PANEL_TOKENS and UNIT == PANEL_ROWS
assert all(UNIT % size == 0 for size in (STEP, ROWS, LONE_ROWS)) and DEPTH % STEP == 0


def may_use_columns(path: KernelPath, hidden: int, width: int) -> bool:
    """Whether experts of these sizes can be computed so."""
    if path.kind.is_lossless:
        return path.activations == "bf16"
    return path.name == "bf16/bf16" and hidden % UNIT == 0 and width % UNIT == 0


def most_blocks(num_pairs: int, num_experts: int, columns_from: int) -> int:
    """Of experts that have ``columns_from`` pairs each, or more."""
    return num_pairs // TOKENS + min(num_experts, num_pairs // columns_from)


@jit
def is_big(job, count):
    """Whether an expert with so many pairs is computed here."""
    return job.columns_from > 0 and count >= job.columns_from


@jit
def any_is_big(job, worker):
    """Whether the step has such an expert."""
    _, starts = routed_experts(job, worker)
    found = False
    for n in range(len(starts) - 1):
        found = found or is_big(job, starts[n + 1] - starts[n])
    return found


@jit
def num_blocks(count):
    return (count + TOKENS - 1) // TOKENS


@jit
def pack_tokens(x_bytes, job, worker, num_workers):
    """One worker's blocks of x."""
    tokens, _ = routed_pairs(job, worker)
    for first, last, block in own_blocks(job, worker, num_workers):
        pack_block(x_bytes, job, tokens, first, last, block)


@jit
def own_blocks(job, worker, num_workers):
    """Yield (first pair, end of the expert's pairs, number) of one worker's blocks of tokens."""
    _, starts = routed_experts(job, worker)
    total = 0
    for n in range(len(starts) - 1):
        count = starts[n + 1] - starts[n]
        total += num_blocks(count) if is_big(job, count) else 0
    begin, end, before = total * worker // num_workers, total * (worker + 1) // num_workers, 0
    for n in range(len(starts) - 1):
        count = starts[n + 1] - starts[n]
        if not is_big(job, count):
            continue
        blocks = num_blocks(count)
        for block in range(max(begin - before, 0), min(end - before, blocks)):
            yield starts[n] + block * TOKENS, starts[n + 1], before + block
        before += blocks


@jit
def pack_block(x_bytes, job, tokens, first, last, block):
    """Pairs ``first``, first + 1, ... up to ``last``, then zeros."""
    at = job.x_blocks + block * job.hidden * BLOCK_BYTES
    for lane in range(TOKENS):
        pair = first + lane
        x = job.x_rows + tokens[pair] * job.x_row_bytes if pair < last else 0
        pack_row(x, x_bytes, job.hidden, lane, at)


@jit
def gate_up_columns(job, place, first, last, block, blocks, worker):
    """act of one expert's rows ``first`` to ``last``; ``blocks`` from ``block`` on: its tokens."""
    row_bytes, sums = 2 * job.hidden, job.column_sums + worker * SUMS_BYTES
    w, act_bytes = job.w13 + place * job.w13_stride, job.width * BLOCK_BYTES
    for row in range(first, last, SUM_ROWS):
        num_rows = min(SUM_ROWS, last - row)
        gate, apart, half_bytes = w + row * row_bytes, job.width * row_bytes, num_rows * SUM_BYTES
        for begin in range(block, block + blocks, SUM_BLOCKS):
            count = min(SUM_BLOCKS, block + blocks - begin)
            x = job.x_blocks + begin * job.hidden * BLOCK_BYTES
            multiply_columns(gate, row_bytes, num_rows, apart, 2, x, count, job.hidden, sums)
            act = job.act_blocks + begin * act_bytes + row // 2 * PAIR_BYTES
            for b in range(count):
                at = sums + 2 * b * half_bytes
                activate_block(job, place, row, num_rows, at, at + half_bytes, act + b * act_bytes)


@jit
def activate_block(job, place, row, num_rows, gate, up, act):
    """Rows of act of one block, as pairs of them; spoils the sums."""
    for r in range(num_rows):
        from_gate, from_up = gate + r * SUM_BYTES, up + r * SUM_BYTES
        if job.b13 != 0:
            bias = f32_array(job.b13 + 4 * place * 2 * job.width, 2 * job.width)
            add_to_all(from_gate, bias[row + r])
            add_to_all(from_up, bias[job.width + row + r])
        activate(job.activation, job.limit, job.alpha, from_gate, from_up, from_gate)
    for r in range(0, num_rows, 2):
        pairs = i32_array(act + r // 2 * PAIR_BYTES, TOKENS)
        first = f32_array(gate + r * SUM_BYTES, TOKENS)
        second = f32_array(gate + (r + 1) * SUM_BYTES, TOKENS)
        for t in range(TOKENS):
            pairs[t] = bf16_pair(bf16_bits(first[t]), bf16_bits(second[t]))


@jit
def add_to_all(sums, number):
    of_tokens = f32_array(sums, TOKENS)
    for t in range(TOKENS):
        of_tokens[t] += number


@jit
def down_columns(job, place, begin, end, pair, last_pair, block, worker):
    """out[:, begin:end] += weight * down of one expert's pairs ``pair`` to ``last_pair``.

    ``block`` is the first one of its act.
    """
    pairs, room = routed_pairs(job, worker), room_of(job, worker)
    row_bytes, sums = 2 * job.width, job.column_sums + worker * SUMS_BYTES
    for row in range(begin, end, 2 * SUM_ROWS):
        w, num_rows = job.w2 + place * job.w2_stride + row * row_bytes, min(2 * SUM_ROWS, end - row)
        for first in range(pair, last_pair, SUM_BLOCKS * TOKENS):
            last = min(first + SUM_BLOCKS * TOKENS, last_pair)
            act = job.act_blocks + (block * TOKENS + first - pair) * row_bytes
            blocks = num_blocks(last - first)
            multiply_columns(w, row_bytes, num_rows, 0, 1, act, blocks, job.width, sums)
            for b in range(blocks):
                count = min(TOKENS, last - first - b * TOKENS)
                for r in range(0, num_rows, UNIT):
                    of_block = f32_array(sums + (b * num_rows + r) * SUM_BYTES, UNIT * TOKENS)
                    pair_b = first + b * TOKENS
                    add_block(job, place, row + r, pairs, pair_b, count, of_block, room[0][0])


@jit
def add_block(job, place, row, pairs, first, count, sums, products):
    """Add one block's UNIT rows; ``products`` is room for them, token by token."""
    for t in range(count):
        for r in range(UNIT):
            products[t, r] = sums[r * TOKENS + t]
    add_bias(job, job.b2, place, job.hidden, row, products, count, UNIT)
    add_weighted(job, pairs, first, count, row, UNIT, products)

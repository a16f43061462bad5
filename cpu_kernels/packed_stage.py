"""The stage of an expert layer with packed weights: four phases, or three with float32 activations.

0. routes and prepared rows of x; 1. act = f(gate, up), by blocks of 16 rows; 2. prepared rows of
act (int8 only); 3. out = sum of weight * down, by blocks of rows of w2.

In phase 1 the routed experts' blocks lie one behind the other and are dealt out in pieces
(:mod:`cpu_kernels.pieces`); in phase 3 a piece has the same blocks of every expert, so that one
worker adds up an output. Of these blocks the first ``kept_rows`` rows are computed: the first
experts whole, at most one in part (whole groups, of w2 as many columns), the others not at all.
"""

from typing import Any

import numpy as np

from cpu_kernels.addresses import f32_array
from cpu_kernels.expert_job import PANEL_ROWS, PANEL_TOKENS, job_array
from cpu_kernels.expert_parts import (
    activate_row,
    add_bias,
    add_weighted,
    clear_out,
    complain,
    padded,
    room_of,
)
from cpu_kernels.intrinsics import jit
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.lossless_dot import GROUP, add_exceptions, as_operand, exceptions_at, factor_of
from cpu_kernels.packed_rows import AS_CODES, prepare_rows
from cpu_kernels.packed_tile import FULL_TOKENS, PART_TOKENS, ROWS, packed_tile
from cpu_kernels.pieces import DOWN, GATE_UP, forget_pieces, num_rounds, pieces
from cpu_kernels.rounding import AS_F32
from cpu_kernels.routes import (
    READ_COST,
    kept_rows,
    kept_width,
    make_routes,
    routed_experts,
    routed_pairs,
    share_of,
)


@jit
def total_cost(starts, kept, width, tile_rows):
    """Cost of all tiles of the first ``kept`` rows, the routed experts lying end to end."""
    cost = 0
    for n in range(len(starts) - 1):
        tiles = (kept_width(kept, n, width) + tile_rows - 1) // tile_rows
        cost += tiles * (READ_COST + starts[n + 1] - starts[n])
    return cost


@jit
def multiply_block(path, block, next_block, xs, num_xs, num_groups, row_groups, out):
    """out[t, r] = row r of the block . x of token t; ``xs`` is padded to whole tiles.

    Of the ``row_groups`` groups of a row the first ``num_groups`` count. ``next_block`` is read
    next; 0: who knows? ``block`` then, which is at hand.
    """
    ahead = next_block if next_block != 0 else block
    for t in range(0, num_xs, FULL_TOKENS):
        at = out + t * PANEL_ROWS * 4
        if num_xs - t == 1:
            packed_tile(path, 1, block, ahead, xs, t, num_groups, row_groups, at, PANEL_ROWS)
        elif num_xs - t <= PART_TOKENS:
            packed_tile(
                path, PART_TOKENS, block, ahead, xs, t, num_groups, row_groups, at, PANEL_ROWS
            )
        else:
            packed_tile(
                path, FULL_TOKENS, block, ahead, xs, t, num_groups, row_groups, at, PANEL_ROWS
            )
    behind = exceptions_at(path, row_groups)
    if behind != 0:
        add_exceptions(block + behind, xs, num_xs, num_groups * GROUP, out, PANEL_ROWS)


@jit
def gate_up_block(path, job, sizes, panel, tokens, room):
    """act[pairs first to last, rows of the block] of one expert."""
    num_groups, block_bytes = sizes
    place, block, first, last, next_block = panel
    products, act, xs, _ = room
    row, num_pairs = block * ROWS, last - first
    num_rows = min(ROWS, job.width - row)
    for t in range(padded(num_pairs)):
        xs[t] = job.x_rows + tokens[min(first + t, last - 1)] * job.x_row_bytes
    base = job.w13 + place * job.w13_stride + 2 * block * block_bytes
    for half in range(2):
        out = products[half].ctypes.data
        at = base + half * block_bytes
        ahead = next_block if half else at + block_bytes
        multiply_block(path, at, ahead, xs, num_pairs, num_groups, num_groups, out)
        bias_row = half * job.width + row
        add_bias(job, job.b13, place, 2 * job.width, bias_row, products[half], num_pairs, num_rows)
    for t in range(num_pairs):
        activate_row(job, products, t, num_rows, act)
        to = f32_array(job.act + 4 * ((first + t) * job.act_cols + row), num_rows)
        for r in range(num_rows):
            to[r] = as_operand(path, act[r])
        if row + ROWS >= job.width:  # what pads the last group
            pads = f32_array(job.act + 4 * (first + t) * job.act_cols, job.act_cols)
            pads[job.width :] = np.float32(0)


@jit
def gate_up_rows(path, job, sizes, n, first_block, last_block, goes_on, worker):
    """act of the n-th routed expert's blocks; ``goes_on``: the next expert's come after them."""
    room = room_of(job, worker)
    places, starts = routed_experts(job, worker)
    tokens, _ = routed_pairs(job, worker)
    for block in range(first_block, last_block):
        next_block = 0
        if block + 1 < last_block:
            next_block = job.w13 + places[n] * job.w13_stride + 2 * (block + 1) * sizes[1]
        elif goes_on and n + 1 < len(places):
            next_block = job.w13 + places[n + 1] * job.w13_stride
        for first in range(starts[n], starts[n + 1], PANEL_TOKENS):
            last = min(first + PANEL_TOKENS, starts[n + 1])
            panel = (places[n], block, first, last, next_block)
            gate_up_block(path, job, sizes, panel, tokens, room)


@jit
def gate_up_piece(path, job, sizes, kept, worker, begin, end):
    """The blocks whose cost lies in [begin, end)."""
    places, starts = routed_experts(job, worker)
    before = 0
    for n in range(len(places)):
        blocks = (kept_width(kept, n, job.width) + ROWS - 1) // ROWS
        cost = READ_COST + starts[n + 1] - starts[n]
        first_block, last_block, before = share_of(cost, blocks, before, begin, end)
        gate_up_rows(path, job, sizes, n, first_block, last_block, before < end, worker)


@jit
def gate_up(path, job, sizes, worker, num_workers):
    _, starts = routed_experts(job, worker)
    kept = kept_rows(job, worker)
    cost = total_cost(starts, kept, job.width, ROWS)
    rounds = num_rounds(2 * kept // ROWS * sizes[1], num_workers)
    forget_pieces(job.taken, DOWN, worker)
    for begin, end in pieces(job.taken, GATE_UP, cost, rounds, worker, num_workers):
        gate_up_piece(path, job, sizes, kept, worker, begin, end)


@jit
def down_block(path, job, sizes, panel, pairs, xs, products):
    """out[tokens of the pairs, rows of the block] += weight * down of one expert."""
    num_groups, row_groups, block_bytes = sizes
    place, block, first, last, next_block = panel
    row, num_pairs = block * ROWS, last - first
    num_rows = min(ROWS, job.hidden - row)
    for t in range(padded(num_pairs)):
        xs[t] = job.act_rows + min(first + t, last - 1) * job.act_row_bytes
    base = job.w2 + place * job.w2_stride + block * block_bytes
    out = products[0].ctypes.data
    multiply_block(path, base, next_block, xs, num_pairs, num_groups, row_groups, out)
    add_bias(job, job.b2, place, job.hidden, row, products[0], num_pairs, num_rows)
    add_weighted(job, pairs, first, num_pairs, row, num_rows, products[0])


@jit
def down_rows(path, job, sizes, n, begin, end, next_kept, worker):
    """Blocks [begin, end) of the n-th routed expert; ``next_kept``: the next expert's width."""
    products, _, xs, _ = room_of(job, worker)
    places, starts = routed_experts(job, worker)
    pairs = routed_pairs(job, worker)
    block_bytes = sizes[2]
    for block in range(begin, end):
        next_block = 0
        if block + 1 < end:
            next_block = job.w2 + places[n] * job.w2_stride + (block + 1) * block_bytes
        elif n + 1 < len(places) and next_kept > 0:
            next_block = job.w2 + places[n + 1] * job.w2_stride + begin * block_bytes
        for first in range(starts[n], starts[n + 1], PANEL_TOKENS):
            last = min(first + PANEL_TOKENS, starts[n + 1])
            panel = (places[n], block, first, last, next_block)
            down_block(path, job, sizes, panel, pairs, xs, products)


@jit
def down_piece(path, job, group, group_bytes, kept, worker, begin, end):
    """Blocks [begin, end) of every expert, so that one worker adds up an output."""
    places, _ = routed_experts(job, worker)
    row_groups, block_bytes = block_sizes(path, job.width, group, group_bytes)
    clear_out(job, begin * ROWS, min(end * ROWS, job.hidden))
    for n in range(len(places)):
        width = kept_width(kept, n, job.width)
        if width == 0:
            break
        sizes = ((width + group - 1) // group, row_groups, block_bytes)
        next_kept = kept_width(kept, n + 1, job.width)
        down_rows(path, job, sizes, n, begin, end, next_kept, worker)


@jit
def down(path, job, group, group_bytes, worker, num_workers):
    kept = kept_rows(job, worker)
    blocks = (job.hidden + ROWS - 1) // ROWS
    rounds = num_rounds(blocks * (kept // group) * group_bytes, num_workers)
    forget_pieces(job.taken, GATE_UP, worker)
    for begin, end in pieces(job.taken, DOWN, blocks, rounds, worker, num_workers):
        down_piece(path, job, group, group_bytes, kept, worker, begin, end)


@jit
def prepare_act(job, group, worker, num_workers):
    """One worker's groups of every expert's rows, which are as long as what is computed."""
    kept, (_, starts) = kept_rows(job, worker), routed_experts(job, worker)
    for n in range(len(starts) - 1):
        width = kept_width(kept, n, job.width)
        first, num_pairs = starts[n], starts[n + 1] - starts[n]
        source, rows = job.act + 4 * first * job.act_cols, job.act_rows + first * job.act_row_bytes
        args = (source, job.act_cols, width, num_pairs, rows, job.act_row_bytes)
        prepare_rows(*args, AS_CODES, group, np.float32(1), worker, num_workers)


@jit
def block_sizes(path, cols, group, group_bytes):
    """Groups of a row, and bytes of a block of 16 rows."""
    num_groups = (cols + group - 1) // group
    behind = exceptions_at(path, num_groups)
    if behind != 0:
        return num_groups, behind + 64 + (num_groups * group + 255) // 256 * 64
    return num_groups, (num_groups * group_bytes + 63) // 64 * 64


def num_phases(kernel: KernelPath) -> int:
    """Of the stage of a path."""
    return 4 if kernel.activations == "int8" else 3


def make_packed_stage(path: int) -> Any:
    """The stage for PATHS[path]; see the phases above."""
    kernel = PATHS[path]
    kind = kernel.kind
    is_int8, group = kernel.activations == "int8", kind.group
    group_bytes = ROWS * (group * kind.bits // 8 + 2 + kind.has_zeros)  # codes, scales, zeros
    factor, form = np.float32(factor_of(kernel)), AS_CODES if is_int8 else AS_F32

    def stage(job_address, phase, worker, num_workers):
        job = job_array(job_address, 1)[0]
        if phase == 0:
            if not make_routes(job, worker):
                complain(job)
            args = (job.x, job.hidden, job.hidden, job.num_tokens, job.x_rows, job.x_row_bytes)
            prepare_rows(*args, form, group, factor, worker, num_workers)
        elif phase == 1:
            sizes = block_sizes(path, job.hidden, group, group_bytes)
            gate_up(path, job, sizes, worker, num_workers)
        elif is_int8 and phase == 2:
            prepare_act(job, group, worker, num_workers)
        else:
            down(path, job, group, group_bytes, worker, num_workers)

    return stage

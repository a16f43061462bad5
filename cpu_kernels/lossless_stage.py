"""The stage of an expert layer with bf12 weights and bf16 activations: three phases or four.

0. routes and prepared rows of x; where experts with many tokens are computed by columns
(:mod:`cpu_kernels.lossless_panels`), a phase that packs their tokens; act = f(gate, up), by blocks
of 16 rows; out = sum of weight * down, by blocks of rows of w2. Pieces, and the experts that are
computed row by row, are as in :mod:`cpu_kernels.packed_stage`.
"""

from typing import Any

import numpy as np

from cpu_kernels.column_panels import CHEAPER, any_is_big, is_big, num_blocks
from cpu_kernels.expert_job import job_array
from cpu_kernels.expert_parts import clear_out, complain
from cpu_kernels.intrinsics import jit
from cpu_kernels.lossless_dot import X_FACTOR
from cpu_kernels.lossless_panels import down_lossless, gate_up_lossless, pack_lifted
from cpu_kernels.lossless_tile import BLOCKS
from cpu_kernels.packed_layout import BLOCK_ROWS
from cpu_kernels.packed_rows import prepare_rows
from cpu_kernels.packed_stage import block_sizes, down_rows, gate_up_rows
from cpu_kernels.pieces import DOWN, GATE_UP, forget_pieces, num_rounds, pieces
from cpu_kernels.rounding import AS_ROUNDED_F32
from cpu_kernels.routes import (
    READ_COST,
    kept_rows,
    kept_width,
    make_routes,
    routed_experts,
    share_of,
)
from cpu_kernels.weight_kind import BF12

FACTOR, GROUP = np.float32(X_FACTOR), BF12.group


@jit
def block_cost(job, count):
    """Of a weight block of an expert with so many pairs."""
    return READ_COST + (count // CHEAPER if is_big(job, count) else count)


@jit
def gate_up_piece(path, job, kept, worker, begin, end):
    """The blocks whose cost lies in [begin, end)."""
    sizes = block_sizes(path, job.hidden, GROUP, 0)
    places, starts = routed_experts(job, worker)
    before = block = 0
    for n in range(len(places)):
        weights = (kept_width(kept, n, job.width) + BLOCK_ROWS - 1) // BLOCK_ROWS
        count = starts[n + 1] - starts[n]
        first, last, before = share_of(block_cost(job, count), weights, before, begin, end)
        if is_big(job, count):
            blocks = num_blocks(count)
            gate_up_lossless(job, sizes[1], places[n], first, last, block, blocks, worker)
            block += blocks
        else:
            gate_up_rows(path, job, sizes, n, first, last, before < end, worker)


@jit
def gate_up_cost(job, kept, worker):
    """Of the blocks of all experts."""
    _, starts = routed_experts(job, worker)
    total = 0
    for n in range(len(starts) - 1):
        blocks = (kept_width(kept, n, job.width) + BLOCK_ROWS - 1) // BLOCK_ROWS
        total += blocks * block_cost(job, starts[n + 1] - starts[n])
    return total


@jit
def gate_up(path, job, worker, num_workers):
    kept = kept_rows(job, worker)
    total = gate_up_cost(job, kept, worker)
    _, block_bytes = block_sizes(path, job.hidden, GROUP, 0)
    rounds = num_rounds(2 * kept // BLOCK_ROWS * block_bytes, num_workers)
    forget_pieces(job.taken, DOWN, worker)
    for begin, end in pieces(job.taken, GATE_UP, total, rounds, worker, num_workers):
        gate_up_piece(path, job, kept, worker, begin, end)


@jit
def down_piece(path, job, kept, worker, begin, end):
    """Blocks [begin, end) of every expert, so that one worker adds up an output."""
    places, starts = routed_experts(job, worker)
    row_groups, block_bytes = block_sizes(path, job.width, GROUP, 0)
    clear_out(job, begin * BLOCK_ROWS, min(end * BLOCK_ROWS, job.hidden))
    block = 0
    for n in range(len(places)):
        width, first, last = kept_width(kept, n, job.width), starts[n], starts[n + 1]
        if width == 0:
            break
        if is_big(job, last - first):
            down_lossless(job, block_bytes, places[n], begin, end, first, last, block, worker)
            block += num_blocks(last - first)
        else:
            sizes = ((width + GROUP - 1) // GROUP, row_groups, block_bytes)
            next_kept = kept_width(kept, n + 1, job.width)
            down_rows(path, job, sizes, n, begin, end, next_kept, worker)


@jit
def down(path, job, worker, num_workers):
    kept, (_, block_bytes) = kept_rows(job, worker), block_sizes(path, job.width, GROUP, 0)
    unit = BLOCKS if any_is_big(job, worker) else 1
    blocks = (job.hidden + BLOCK_ROWS - 1) // BLOCK_ROWS
    units = (blocks + unit - 1) // unit
    rounds = num_rounds(blocks * block_bytes * kept // job.width, num_workers)
    forget_pieces(job.taken, GATE_UP, worker)
    for first, last in pieces(job.taken, DOWN, units, rounds, worker, num_workers):
        down_piece(path, job, kept, worker, first * unit, min(last * unit, blocks))


def num_phases(*, has_columns: bool) -> int:
    """For a layer whose experts may be computed by columns or not."""
    return 3 + has_columns


def make_lossless_stage(path: int) -> Any:
    """The stage for PATHS[path]; see the phases above."""

    def stage(job_address, phase, worker, num_workers):
        job = job_array(job_address, 1)[0]
        left = job.num_phases - phase
        if phase == 0:
            if not make_routes(job, worker):
                complain(job)
            args = (job.x, job.hidden, job.hidden, job.num_tokens, job.x_rows, job.x_row_bytes)
            prepare_rows(*args, AS_ROUNDED_F32, GROUP, FACTOR, worker, num_workers)
        elif left == 1:
            down(path, job, worker, num_workers)
        elif left == 2:
            gate_up(path, job, worker, num_workers)
        else:
            pack_lifted(job, worker, num_workers)

    return stage

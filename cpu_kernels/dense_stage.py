"""The stage of an expert layer with row-major weights (bf16 or float32): two phases to four.

Routes and act = f(gate, up), by tiles of rows; out = sum of weight * down. With bf16 activations
there is a phase before these that rounds x, and where experts with many tokens are computed by
columns (:mod:`cpu_kernels.column_panels`), another that packs those. Pieces are as in
:mod:`cpu_kernels.packed_stage`. The routed experts lie end to end, and the first ``kept_rows`` rows
of gate and up are computed: the first experts whole, at most one in part (of whose w2 as many
columns), the others not at all.
"""

from typing import Any

from cpu_kernels.column_panels import (
    CHEAPER,
    UNIT,
    any_is_big,
    down_columns,
    gate_up_columns,
    is_big,
    num_blocks,
    pack_tokens,
)
from cpu_kernels.dense_panels import down_panel, gate_up_panel
from cpu_kernels.dot_tile import ROWS, part_sizes, x_bytes
from cpu_kernels.expert_job import PANEL_ROWS, PANEL_TOKENS, job_array
from cpu_kernels.expert_parts import clear_out, complain, room_of, sums_of
from cpu_kernels.intrinsics import jit
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.pieces import DOWN, GATE_UP, forget_pieces, num_rounds, pieces
from cpu_kernels.rounding import AS_BF16, AS_F32, AS_ROUNDED_F32, round_x
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
def unit_of(job, count):
    """(rows of an expert with so many pairs that are dealt out at a time, what they cost)."""
    if is_big(job, count):
        return UNIT, UNIT // ROWS * (READ_COST + count // CHEAPER)
    return ROWS, READ_COST + count


@jit
def gate_up_rows(path, part, form, row_bytes, job, n, first_row, last_row, goes_on, worker):
    """act of the n-th routed expert's rows; ``goes_on``: the next expert's come after them."""
    room, sums = room_of(job, worker), sums_of(job, worker)
    places, starts = routed_experts(job, worker)
    tokens, _ = routed_pairs(job, worker)
    for row in range(first_row, last_row, PANEL_ROWS):
        num_rows = min(PANEL_ROWS, last_row - row)
        next_row = 0
        if row + num_rows < last_row:
            next_row = job.w13 + places[n] * job.w13_stride + (row + num_rows) * row_bytes
        elif goes_on and n + 1 < len(places):
            next_row = job.w13 + places[n + 1] * job.w13_stride
        for first in range(starts[n], starts[n + 1], PANEL_TOKENS):
            last = min(first + PANEL_TOKENS, starts[n + 1])
            panel = (places[n], row, num_rows, first, last, next_row)
            gate_up_panel(path, part, form, job, row_bytes, panel, tokens, room, sums)


@jit
def gate_up_piece(path, part, form, row_bytes, job, kept, worker, begin, end):
    """The rows whose cost lies in [begin, end)."""
    places, starts = routed_experts(job, worker)
    before = block = 0
    for n in range(len(places)):
        width, count = kept_width(kept, n, job.width), starts[n + 1] - starts[n]
        unit, cost = unit_of(job, count)
        units = (width + unit - 1) // unit
        first_unit, last_unit, before = share_of(cost, units, before, begin, end)
        first_row, last_row = first_unit * unit, min(last_unit * unit, width)
        if is_big(job, count):
            blocks = num_blocks(count)
            gate_up_columns(job, places[n], first_row, last_row, block, blocks, worker)
            block += blocks
        else:
            goes_on = before < end
            gate_up_rows(path, part, form, row_bytes, job, n, first_row, last_row, goes_on, worker)


@jit
def gate_up_cost(job, kept, worker):
    """Of the rows of all experts."""
    _, starts = routed_experts(job, worker)
    total = 0
    for n in range(len(starts) - 1):
        unit, cost = unit_of(job, starts[n + 1] - starts[n])
        total += (kept_width(kept, n, job.width) + unit - 1) // unit * cost
    return total


@jit
def gate_up(path, part, form, row_bytes, job, worker, num_workers):
    kept = kept_rows(job, worker)
    total = gate_up_cost(job, kept, worker)
    rounds = num_rounds(2 * kept * row_bytes, num_workers)
    forget_pieces(job.taken, DOWN, worker)
    for begin, end in pieces(job.taken, GATE_UP, total, rounds, worker, num_workers):
        gate_up_piece(path, part, form, row_bytes, job, kept, worker, begin, end)


@jit
def down_rows(path, part, row_bytes, job, n, width, begin, end, next_kept, worker):
    """Rows [begin, end) of the n-th routed expert; ``next_kept``: the next expert's width."""
    room, sums = room_of(job, worker), sums_of(job, worker)
    places, starts = routed_experts(job, worker)
    pairs = routed_pairs(job, worker)
    for row in range(begin, end, PANEL_ROWS):
        num_rows = min(PANEL_ROWS, end - row)
        next_row = 0
        if row + num_rows < end:
            next_row = job.w2 + places[n] * job.w2_stride + (row + num_rows) * row_bytes
        elif n + 1 < len(places) and next_kept > 0:
            next_row = job.w2 + places[n + 1] * job.w2_stride + begin * row_bytes
        for first in range(starts[n], starts[n + 1], PANEL_TOKENS):
            last = min(first + PANEL_TOKENS, starts[n + 1])
            panel = (places[n], row, num_rows, first, last, next_row)
            down_panel(path, part, job, row_bytes, width, panel, pairs, room, sums)


@jit
def down_piece(path, part, row_bytes, job, kept, worker, begin, end):
    """Rows [begin, end) of every expert, so that one worker adds up an output."""
    places, starts = routed_experts(job, worker)
    clear_out(job, begin, end)
    block = 0
    for n in range(len(places)):
        width, count = kept_width(kept, n, job.width), starts[n + 1] - starts[n]
        if width == 0:
            break
        if is_big(job, count):
            down_columns(job, places[n], begin, end, starts[n], starts[n + 1], block, worker)
            block += num_blocks(count)
        else:
            next_kept = kept_width(kept, n + 1, job.width)
            down_rows(path, part, row_bytes, job, n, width, begin, end, next_kept, worker)


@jit
def down(path, part, weight_bytes, job, worker, num_workers):
    kept, row_bytes = kept_rows(job, worker), job.width * weight_bytes
    unit = UNIT if any_is_big(job, worker) else ROWS
    units = (job.hidden + unit - 1) // unit
    rounds = num_rounds(kept * job.hidden * weight_bytes, num_workers)
    forget_pieces(job.taken, GATE_UP, worker)
    for first, last in pieces(job.taken, DOWN, units, rounds, worker, num_workers):
        begin, end = first * unit, min(last * unit, job.hidden)
        down_piece(path, part, row_bytes, job, kept, worker, begin, end)


def num_phases(kernel: KernelPath, *, has_columns: bool = False) -> int:
    """Of the stage of a path, for a layer whose experts may be computed by columns or not."""
    return 2 + (kernel.activations == "bf16") + has_columns


def make_dense_stage(path: int) -> Any:
    """The stage for PATHS[path]; see the phases above."""
    kernel = PATHS[path]
    weight_bytes = 2 if kernel.kind.codes == "bf16" else 4
    rounds, size = kernel.activations == "bf16", x_bytes(kernel)
    form = AS_F32 if not rounds else AS_BF16 if size == 2 else AS_ROUNDED_F32
    part = part_sizes(kernel)

    def stage(job_address, phase, worker, num_workers):
        job = job_array(job_address, 1)[0]
        if phase == 0 and not make_routes(job, worker):
            complain(job)
        left = job.num_phases - phase
        if left == 1:
            down(path, part, weight_bytes, job, worker, num_workers)
        elif left == 2:
            gate_up(path, part, form, job.hidden * weight_bytes, job, worker, num_workers)
        elif phase == 0:
            round_x(form, job, worker, num_workers)
        else:
            pack_tokens(size, job, worker, num_workers)

    return stage

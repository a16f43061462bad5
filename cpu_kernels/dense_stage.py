"""The stage of an expert layer with row-major weights (bf16 or float32): two phases, or three.

Routes and act = f(gate, up), by tiles of rows; out = sum of weight * down. With bf16 activations
there is a phase before these that rounds x. Pieces are as in :mod:`cpu_kernels.packed_stage`. The
routed experts lie end to end, and the first ``kept_rows`` rows of gate and up are computed: the
first experts whole, at most one in part (of whose w2 as many columns), the others not at all.
"""

from typing import Any

import numpy as np

from cpu_kernels.addresses import bits_of, f32_array, float_of, u16_array
from cpu_kernels.dot_tile import (
    FEW_TOKENS,
    MANY_ROWS,
    MANY_TOKENS,
    ROWS,
    dot_tile,
    dot_tile_end,
    dot_tile_part,
    part_sizes,
    x_bytes,
)
from cpu_kernels.expert_job import PANEL_ROWS, PANEL_TOKENS, job_array
from cpu_kernels.expert_parts import (
    activate_row,
    add_bias,
    add_weighted,
    clear_out,
    complain,
    padded,
    room_of,
    sums_of,
)
from cpu_kernels.intrinsics import jit
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.pieces import DOWN, GATE_UP, forget_pieces, num_rounds, pieces
from cpu_kernels.routes import (
    kept_rows,
    kept_width,
    make_routes,
    routed_experts,
    routed_pairs,
    share_of,
    total_cost,
)
from cpu_kernels.vector_ir import LANES

AS_F32, AS_ROUNDED_F32, AS_BF16 = range(3)  # how the products read hidden states


@jit
def bf16_bits(x):
    """bf16 of a float32, to nearest even, in the upper half of an int32; NaN stays NaN."""
    bits = bits_of(x)
    if bits & 0x7FFFFFFF > 0x7F800000:
        return np.int32(bits | 0x400000)
    return np.int32((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF)


@jit
def store_row(form, x, address):
    """Write the float32 array ``x`` to ``address`` in one of the forms above."""
    if form == AS_BF16:
        halves = u16_array(address, len(x))
        for k in range(len(x)):
            halves[k] = np.uint16((bf16_bits(x[k]) >> 16) & 0xFFFF)
    else:
        floats = f32_array(address, len(x))
        for k in range(len(x)):
            floats[k] = float_of(bf16_bits(x[k])) if form == AS_ROUNDED_F32 else x[k]


@jit
def round_x(form, job, worker, num_workers):
    """One worker's part of x as the products read it; the parts are runs of elements."""
    size = 2 if form == AS_BF16 else 4
    total = job.num_tokens * job.hidden
    begin, end = total * worker // num_workers, total * (worker + 1) // num_workers
    store_row(form, f32_array(job.x + 4 * begin, end - begin), job.x_rows + size * begin)


@jit
def multiply_panel(path, part, rows, num_rows, xs, num_xs, length, out, sums):
    """out[t, r] = rows[r] . xs[t]; ``rows`` and ``xs`` are addresses, padded to whole tiles.

    Behind ``rows`` is the tile to be read next.

    ``out`` is the address of [PANEL_TOKENS, PANEL_ROWS] float32. The bits are the same whichever
    tiles are used.
    """
    if num_xs > PANEL_TOKENS - FEW_TOKENS:
        multiply_in_parts(path, part, rows, num_rows, xs, num_xs, length, out, sums)
        return
    t = 0
    while t < num_xs:
        for r in range(0, num_rows, ROWS):
            at = out + (t * PANEL_ROWS + r) * 4
            if num_xs - t == 1:
                dot_tile(path, ROWS, 1, rows, r, xs, t, length, at, PANEL_ROWS)
            elif num_xs - t <= FEW_TOKENS:
                dot_tile(path, ROWS, FEW_TOKENS, rows, r, xs, t, length, at, PANEL_ROWS)
            else:
                for half in range(0, ROWS, MANY_ROWS):
                    to = at + half * 4
                    dot_tile(
                        path, MANY_ROWS, MANY_TOKENS, rows, r + half, xs, t, length, to, PANEL_ROWS
                    )
        t += FEW_TOKENS if num_xs - t <= FEW_TOKENS else MANY_TOKENS


@jit
def multiply_in_parts(path, part, rows, num_rows, xs, num_xs, length, out, sums):
    """As :func:`multiply_panel`, so many elements of the rows at a time; ``part`` as part_sizes.

    A part of the tokens' rows stays in the first level of cache while all rows of weights pass.
    """
    part_elements, vector_elements = part
    tile_bytes = MANY_ROWS * MANY_TOKENS * 4 * LANES
    tiles_r = (num_rows + MANY_ROWS - 1) // MANY_ROWS
    whole = length // vector_elements * vector_elements
    f32_array(sums, tiles_r * (PANEL_TOKENS // MANY_TOKENS) * tile_bytes // 4)[:] = np.float32(0)
    for begin in range(0, whole, part_elements):
        end = min(begin + part_elements, whole)
        for t in range(0, num_xs, MANY_TOKENS):
            for r in range(tiles_r):
                at = sums + (t // MANY_TOKENS * tiles_r + r) * tile_bytes
                dot_tile_part(path, rows, r * MANY_ROWS, xs, t, begin, end, at)
    for t in range(0, num_xs, MANY_TOKENS):
        for r in range(tiles_r):
            at = sums + (t // MANY_TOKENS * tiles_r + r) * tile_bytes
            to = out + (t * PANEL_ROWS + r * MANY_ROWS) * 4
            dot_tile_end(path, rows, r * MANY_ROWS, xs, t, whole, length, at, to, PANEL_ROWS)


@jit
def fill_addresses(addresses, count, base, first, last, stride):
    """Addresses of ``count`` rows first, first + 1, ...; rows after ``last`` repeat it."""
    for k in range(min(count, len(addresses))):
        addresses[k] = base + min(first + k, last) * stride


@jit
def fill_rows(addresses, first, num_rows, stride, next_row):
    """Addresses of a panel's rows, padded to whole tiles, and of the tile to be read next.

    ``first`` and ``next_row`` are addresses; 0: who knows what is next? Then it is the first tile.
    """
    fill_addresses(addresses, num_rows + ROWS - 1, first, 0, num_rows - 1, stride)
    tiles = (num_rows + ROWS - 1) // ROWS
    behind = addresses[tiles * ROWS : (tiles + 1) * ROWS]
    fill_addresses(behind, ROWS, next_row if next_row != 0 else first, 0, ROWS - 1, stride)


@jit
def gate_up_panel(path, part, form, job, row_bytes, panel, tokens, room, sums):
    """act[pairs first to last, rows] of one expert; then the row at ``next_row`` is read."""
    place, row, num_rows, first, last, next_row = panel
    products, act, xs, rows = room
    num_pairs = last - first
    for t in range(padded(num_pairs)):
        xs[t] = job.x_rows + tokens[min(first + t, last - 1)] * job.x_row_bytes
    gate = job.w13 + place * job.w13_stride + row * row_bytes
    up = gate + job.width * row_bytes
    for half in range(2):
        fill_rows(rows, up if half else gate, num_rows, row_bytes, next_row if half else up)
        out = products[half].ctypes.data
        multiply_panel(path, part, rows, num_rows, xs, num_pairs, job.hidden, out, sums)
        bias_row = half * job.width + row
        add_bias(job, job.b13, place, 2 * job.width, bias_row, products[half], num_pairs, num_rows)
    size = 2 if form == AS_BF16 else 4
    for t in range(num_pairs):
        activate_row(job, products, t, num_rows, act)
        at = job.act_rows + (first + t) * job.act_row_bytes + size * row
        store_row(form, act[:num_rows], at)


@jit
def gate_up_piece(path, part, form, row_bytes, job, kept, worker, begin, end):
    """The tiles whose cost lies in [begin, end)."""
    room, sums = room_of(job, worker), sums_of(job, worker)
    places, starts = routed_experts(job, worker)
    tokens, _ = routed_pairs(job, worker)
    before = 0
    for n in range(len(places)):
        width = kept_width(kept, n, job.width)
        tiles = (width + ROWS - 1) // ROWS
        first_tile, last_tile, before = share_of(starts, n, tiles, before, begin, end)
        last_row = min(last_tile * ROWS, width)
        for row in range(first_tile * ROWS, last_row, PANEL_ROWS):
            num_rows = min(PANEL_ROWS, last_row - row)
            next_row = 0
            if row + num_rows < last_row:
                next_row = job.w13 + places[n] * job.w13_stride + (row + num_rows) * row_bytes
            elif before < end and n + 1 < len(places):
                next_row = job.w13 + places[n + 1] * job.w13_stride
            for first in range(starts[n], starts[n + 1], PANEL_TOKENS):
                last = min(first + PANEL_TOKENS, starts[n + 1])
                panel = (places[n], row, num_rows, first, last, next_row)
                gate_up_panel(path, part, form, job, row_bytes, panel, tokens, room, sums)


@jit
def gate_up(path, part, form, row_bytes, job, worker, num_workers):
    _, starts = routed_experts(job, worker)
    kept = kept_rows(job, worker)
    cost = total_cost(starts, kept, job.width, ROWS)
    rounds = num_rounds(2 * kept * row_bytes, num_workers)
    forget_pieces(job.taken, DOWN, worker)
    for begin, end in pieces(job.taken, GATE_UP, cost, rounds, worker, num_workers):
        gate_up_piece(path, part, form, row_bytes, job, kept, worker, begin, end)


@jit
def down_panel(path, part, job, row_bytes, width, panel, pairs, room, sums):
    """out[tokens of the pairs, rows] += weight * (rows of one expert) . act[:width].

    Then the row at ``next_row`` is read.
    """
    place, row, num_rows, first, last, next_row = panel
    products, _, xs, rows = room
    num_pairs = last - first
    first_row = job.w2 + place * job.w2_stride + row * row_bytes
    fill_rows(rows, first_row, num_rows, row_bytes, next_row)
    fill_addresses(xs, padded(num_pairs), job.act_rows, first, last - 1, job.act_row_bytes)
    out = products[0].ctypes.data
    multiply_panel(path, part, rows, num_rows, xs, num_pairs, width, out, sums)
    add_bias(job, job.b2, place, job.hidden, row, products[0], num_pairs, num_rows)
    add_weighted(job, pairs, first, num_pairs, row, num_rows, products[0])


@jit
def down_piece(path, part, row_bytes, job, kept, worker, begin, end):
    """Rows [begin, end) of every expert, so that one worker adds up an output."""
    room, sums = room_of(job, worker), sums_of(job, worker)
    places, starts = routed_experts(job, worker)
    pairs = routed_pairs(job, worker)
    clear_out(job, begin, end)
    for n in range(len(places)):
        width = kept_width(kept, n, job.width)
        if width == 0:
            break
        for row in range(begin, end, PANEL_ROWS):
            num_rows = min(PANEL_ROWS, end - row)
            next_row = 0
            if row + num_rows < end:
                next_row = job.w2 + places[n] * job.w2_stride + (row + num_rows) * row_bytes
            elif n + 1 < len(places) and kept_width(kept, n + 1, job.width) > 0:
                next_row = job.w2 + places[n + 1] * job.w2_stride + begin * row_bytes
            for first in range(starts[n], starts[n + 1], PANEL_TOKENS):
                last = min(first + PANEL_TOKENS, starts[n + 1])
                panel = (places[n], row, num_rows, first, last, next_row)
                down_panel(path, part, job, row_bytes, width, panel, pairs, room, sums)


@jit
def down(path, part, weight_bytes, job, worker, num_workers):
    kept, row_bytes = kept_rows(job, worker), job.width * weight_bytes
    tiles = (job.hidden + ROWS - 1) // ROWS
    rounds = num_rounds(kept * job.hidden * weight_bytes, num_workers)
    forget_pieces(job.taken, GATE_UP, worker)
    for first, last in pieces(job.taken, DOWN, tiles, rounds, worker, num_workers):
        begin, end = first * ROWS, min(last * ROWS, job.hidden)
        down_piece(path, part, row_bytes, job, kept, worker, begin, end)


def num_phases(kernel: KernelPath) -> int:
    """Of the stage of a path."""
    return 3 if kernel.activations == "bf16" else 2


def make_dense_stage(path: int) -> Any:
    """The stage for PATHS[path]; see the phases above."""
    kernel = PATHS[path]
    weight_bytes = 2 if kernel.kind.codes == "bf16" else 4
    rounds = kernel.activations == "bf16"
    form = AS_F32 if not rounds else AS_BF16 if x_bytes(kernel) == 2 else AS_ROUNDED_F32
    gate_up_phase = 1 if rounds else 0
    part = part_sizes(kernel)

    def stage(job_address, phase, worker, num_workers):
        job = job_array(job_address, 1)[0]
        if phase == 0 and not make_routes(job, worker):
            complain(job)
        if phase < gate_up_phase:
            round_x(form, job, worker, num_workers)
        elif phase == gate_up_phase:
            gate_up(path, part, form, job.hidden * weight_bytes, job, worker, num_workers)
        else:
            down(path, part, weight_bytes, job, worker, num_workers)

    return stage

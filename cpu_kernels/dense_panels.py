"""Panels of row-major experts: a few tokens times a few rows of weights, from products to sums.

The rows of a panel stay in cache while all tokens pass over them, by tiles
(:mod:`cpu_kernels.dot_tile`).
"""

import numpy as np

from cpu_kernels.addresses import f32_array
from cpu_kernels.dot_tile import (
    FEW_TOKENS,
    MANY_ROWS,
    MANY_TOKENS,
    ROWS,
    dot_tile,
    dot_tile_end,
    dot_tile_part,
)
from cpu_kernels.expert_job import PANEL_ROWS, PANEL_TOKENS
from cpu_kernels.expert_parts import activate_row, add_bias, add_weighted, padded
from cpu_kernels.intrinsics import jit
from cpu_kernels.rounding import AS_BF16, store_row
from cpu_kernels.vector_ir import LANES


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

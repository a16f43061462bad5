"""Numba kernels of one expert layer: two stages over panels of weight rows.

E experts, I expert width, H hidden, T tokens, P (expert, token, weight) pairs sorted by expert and
then token, N experts that have a pair.

Stage 1 writes act_PI = silu(gate) * up for rows of w13, stage 2 writes out_TH from rows of w2; each
worker owns the same slice of rows of every expert. So uneven routing leaves the shares even, and
one worker alone adds up an output element, expert after expert.
"""

import numpy as np

from cpu_kernels.dot_tile import (
    ROWS,
    TOKENS,
    dot_tile_bf16,
    dot_tile_bf16_1,
    dot_tile_f32,
    dot_tile_f32_1,
)
from cpu_kernels.intrinsics import f32_array, i64_array, jit, power_of_two

# One layer's work: addresses and sizes. Weights are bf16 bits or float32. Or, where num_readers is
# not 0, a plain read of read_words int64 at read, with one result for each worker at out.
JOB = np.dtype(
    [
        (name, np.int64)
        for name in (
            *("w13", "w2", "x", "out", "act"),  # addresses of [E,2I,H] [E,H,I] [T,H] [T,H] [P,I]
            *("expert", "start", "token", "weight"),  # of [N] [N+1] [P] int64 and [P] float32
            *("num_experts", "num_tokens", "hidden", "width", "is_bf16"),
            *("num_readers", "read", "read_words"),
        )
    ]
)

# A panel is what one pass multiplies: its rows stay in cache while all the tokens pass over them.
PANEL_ROWS = 32
PANEL_TOKENS = 16

# exp(x) = 2^n exp(r), r = x - n ln 2, by the polynomial of the Cephes library.
EXP_MIN, EXP_MAX = np.float32(-87), np.float32(88)
LOG2_E = np.float32(1.44269504088896341)
ROUNDER = np.float32(1.5 * 2**23)  # added to a number it leaves the nearest integer in the low bits
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_TERMS = tuple(
    np.float32(term)
    for term in (
        *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
        *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    )
)


@jit
def multiply_panel(is_bf16, rows, num_rows, xs, num_xs, length, out):
    """out[t, r] = rows[r] . xs[t]; ``rows`` and ``xs`` are addresses, padded to whole tiles.

    ``out`` is the address of [PANEL_TOKENS, PANEL_ROWS] float32.
    """
    for t in range(0, num_xs, TOKENS):
        is_single = num_xs - t == 1
        for r in range(0, num_rows, ROWS):
            at = out + (t * PANEL_ROWS + r) * 4
            if is_bf16 and is_single:
                dot_tile_bf16_1(rows, r, xs, t, length, at, PANEL_ROWS)
            elif is_bf16:
                dot_tile_bf16(rows, r, xs, t, length, at, PANEL_ROWS)
            elif is_single:
                dot_tile_f32_1(rows, r, xs, t, length, at, PANEL_ROWS)
            else:
                dot_tile_f32(rows, r, xs, t, length, at, PANEL_ROWS)


@jit
def fill_addresses(addresses, base, first, last, stride):
    """Addresses of rows first, first + 1, ...; rows after ``last`` repeat it."""
    for k in range(len(addresses)):
        addresses[k] = base + min(first + k, last) * stride


@jit
def exp(x):
    """exp(x) for x in [-87, 88], limited to that; relative error below 3e-7.

    In plain arithmetic, so that the loops around it become vectors; the library's exp stays a call.
    """
    limited = x if x > EXP_MIN else EXP_MIN
    limited = limited if limited < EXP_MAX else EXP_MAX
    shifted = limited * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = limited - n * LN2_HIGH - n * LN2_LOW
    p = EXP_TERMS[0]
    for term in EXP_TERMS[1:]:
        p = p * r + term
    return power_of_two(shifted) * (p * r * r + r + np.float32(1))


@jit
def silu_mul(gate, up):
    return gate / (np.float32(1) + exp(-gate)) * up


@jit
def gate_up_panel(job, expert, first_row, num_rows, first_pair, num_pairs, rows, xs, products):
    """act[pairs, rows] of one expert."""
    row_bytes = job.hidden * (2 if job.is_bf16 else 4)
    token = i64_array(job.token, first_pair + num_pairs)
    for t in range(PANEL_TOKENS):
        xs[t] = job.x + token[first_pair + min(t, num_pairs - 1)] * job.hidden * 4
    for half in range(2):
        base = job.w13 + (2 * expert + half) * job.width * row_bytes
        fill_addresses(rows, base, first_row, first_row + num_rows - 1, row_bytes)
        out = products[half].ctypes.data
        multiply_panel(job.is_bf16, rows, num_rows, xs, num_pairs, job.hidden, out)
    for t in range(num_pairs):
        act = f32_array(job.act + (first_pair + t) * job.width * 4, job.width)
        for r in range(num_rows):
            act[first_row + r] = silu_mul(products[0, t, r], products[1, t, r])


@jit
def down_panel(job, expert, first_row, num_rows, first_pair, num_pairs, rows, xs, products):
    """out[tokens of the pairs, rows] += weight * (rows of one expert) . act."""
    row_bytes = job.width * (2 if job.is_bf16 else 4)
    token = i64_array(job.token, first_pair + num_pairs)
    weight = f32_array(job.weight, first_pair + num_pairs)
    base = job.w2 + expert * job.hidden * row_bytes
    fill_addresses(rows, base, first_row, first_row + num_rows - 1, row_bytes)
    fill_addresses(xs, job.act, first_pair, first_pair + num_pairs - 1, job.width * 4)
    multiply_panel(job.is_bf16, rows, num_rows, xs, num_pairs, job.width, products[0].ctypes.data)
    for t in range(num_pairs):
        pair = first_pair + t
        out = f32_array(job.out + token[pair] * job.hidden * 4, job.hidden)
        for r in range(num_rows):
            out[first_row + r] += weight[pair] * products[0, t, r]


@jit
def run_stage(job, is_down, row_begin, row_end):
    """One worker's rows of every expert."""
    rows, xs = np.empty(PANEL_ROWS, np.int64), np.empty(PANEL_TOKENS, np.int64)
    products = np.empty((2, PANEL_TOKENS, PANEL_ROWS), np.float32)
    expert = i64_array(job.expert, job.num_experts)
    start = i64_array(job.start, job.num_experts + 1)
    for n in range(job.num_experts):
        for row in range(row_begin, row_end, PANEL_ROWS):
            num_rows = min(PANEL_ROWS, row_end - row)
            for pair in range(start[n], start[n + 1], PANEL_TOKENS):
                num_pairs = min(PANEL_TOKENS, start[n + 1] - pair)
                panel = (expert[n], row, num_rows, pair, num_pairs)
                if is_down:
                    down_panel(job, *panel, rows, xs, products)
                else:
                    gate_up_panel(job, *panel, rows, xs, products)


@jit
def clear_out(job, row_begin, row_end):
    for t in range(job.num_tokens):
        f32_array(job.out + t * job.hidden * 4, job.hidden)[row_begin:row_end] = np.float32(0)


@jit
def share(num_rows, worker, num_workers):
    """The rows of one worker: [begin, end), whole tiles."""
    tiles = (num_rows + ROWS - 1) // ROWS
    begin = worker * tiles // num_workers * ROWS
    end = (worker + 1) * tiles // num_workers * ROWS
    return min(begin, num_rows), min(end, num_rows)

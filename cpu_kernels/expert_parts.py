"""What the stages of packed and row-major weights share: room, biases, the weighted sum."""

import numpy as np

from cpu_kernels.activations import CHUNK, activate
from cpu_kernels.addresses import f32_array, i64_array
from cpu_kernels.expert_job import NEXT_ROWS, PANEL_ROWS, PANEL_TOKENS
from cpu_kernels.intrinsics import jit

UNKNOWN_ID = 1  # error: an id names no expert


@jit
def sums_of(job, worker):
    """Address of a worker's sums of a panel, a vector of 64 bytes for each product."""
    return job.workers + worker * job.worker_stride


@jit
def room_of(job, worker):
    """A worker's (products [2, PANEL_TOKENS, PANEL_ROWS], act [PANEL_ROWS], xs, rows).

    ``rows`` has PANEL_ROWS + NEXT_ROWS addresses.
    """
    size = PANEL_TOKENS * PANEL_ROWS
    at = sums_of(job, worker) + 64 * size
    products = f32_array(at, 2 * size).reshape(2, PANEL_TOKENS, PANEL_ROWS)
    act = f32_array(at + 8 * size, PANEL_ROWS)
    at += 8 * size + 4 * PANEL_ROWS
    rows = i64_array(at + 8 * PANEL_TOKENS, PANEL_ROWS + NEXT_ROWS)
    return products, act, i64_array(at, PANEL_TOKENS), rows


@jit
def padded(num_tokens):
    """Tokens that tiles may read for ``num_tokens``: those after the last repeat it."""
    return num_tokens if num_tokens == 1 else PANEL_TOKENS


@jit
def complain(job):
    i64_array(job.error, 1)[0] = UNKNOWN_ID


@jit
def add_bias(job, base, expert, stride, first_row, products, num_tokens, num_rows):
    if base != 0:
        bias = f32_array(base + 4 * (expert * stride + first_row), num_rows)
        for t in range(num_tokens):
            for r in range(num_rows):
                products[t, r] += bias[r]


@jit
def activate_row(job, products, t, num_rows, act):
    """act = f(gate, up) of one token of a panel; rows after ``num_rows`` up to a chunk are spoilt.

    What they hold before does not matter: it never leaves the panel.
    """
    gate, up = products[0, t].ctypes.data, products[1, t].ctypes.data
    for r in range(0, 4 * num_rows, 4 * CHUNK):
        kind, to = job.activation, act.ctypes.data + r
        activate(kind, job.limit, job.alpha, gate + r, up + r, to)


@jit
def clear_out(job, first_row, last_row):
    for t in range(job.num_tokens):
        out = f32_array(job.out + 4 * t * job.hidden, job.hidden)
        out[first_row:last_row] = np.float32(0)


@jit
def add_weighted(job, pairs, first, num_pairs, row, num_rows, products):
    """out[token, row...] += weight * products for pairs ``first``, first + 1, ..."""
    tokens, weights = pairs
    whole = num_rows // CHUNK * CHUNK
    for t in range(num_pairs):
        weight = weights[first + t]
        to = job.out + 4 * (tokens[first + t] * job.hidden + row)
        come_from = products[t].ctypes.data
        for r in range(0, whole, CHUNK):  # a known number of rows: whole vectors, no remainder
            add_rows(weight, f32_array(come_from + 4 * r, CHUNK), f32_array(to + 4 * r, CHUNK))
        rest = num_rows - whole
        add_rows(weight, f32_array(come_from + 4 * whole, rest), f32_array(to + 4 * whole, rest))


@jit
def add_rows(weight, products, out):
    for r in range(len(out)):
        out[r] += weight * products[r]

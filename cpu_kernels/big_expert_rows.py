"""What happens to rows around the products of experts with many tokens: gather, activate, add up.

Rows are float32 or bf16. Q rows of pairs, H hidden, I expert width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from cpu_kernels import addresses, intrinsics
from cpu_kernels.activations import CHUNK, activate
from cpu_kernels.addresses import f32_array, float_of, i64_array, u16_array
from cpu_kernels.compiled import compile_entry, stamped
from cpu_kernels.dense_stage import AS_BF16, AS_F32, store_row
from cpu_kernels.intrinsics import jit

_INT, _BOOL, _F32 = types.int64, types.boolean, types.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKernels:
    """Compiled, without the GIL; what they are given are addresses, sizes and bytes of a row."""

    run_stage: Callable[[int, int, int, int, int], None]
    flush_denormals: Callable[[], int]  # returns the float modes of before
    set_modes: Callable[[int], None]
    gather: Callable[..., None]
    activate: Callable[..., None]
    add_up: Callable[..., None]


@jit
def store(is_bf16, row, address):
    if is_bf16:
        store_row(AS_BF16, row, address)
    else:
        store_row(AS_F32, row, address)


@jit
def load(is_bf16, address, bias, row):
    """row = the numbers at ``address``, plus the float32 at ``bias`` if that is not 0."""
    if is_bf16:
        halves = u16_array(address, len(row))
        for k in range(len(row)):
            row[k] = float_of(np.int32(np.int32(halves[k]) << 16))
    else:
        floats = f32_array(address, len(row))
        for k in range(len(row)):
            row[k] = floats[k]
    if bias != 0:
        added = f32_array(bias, len(row))
        for k in range(len(row)):
            row[k] += added[k]


def run_stage(stage, job, phase, worker, num_workers):
    """A worker's share of a compiled stage's phase; leaves the thread's float modes alone."""
    control = intrinsics.float_control()
    intrinsics.flush_denormals()
    intrinsics.call_stage(stage, job, phase, worker, num_workers)
    intrinsics.set_float_control(control)


def flush_denormals():
    """From now on, on this thread; returns what :func:`set_modes` wants to undo it."""
    control = intrinsics.float_control()
    intrinsics.flush_denormals()
    return control


def set_modes(control):
    intrinsics.set_float_control(control)


@jit
def row_of(x, token, zeros):
    """A token's row of x, or ``zeros``, which are as many, for token -1."""
    return zeros if token < 0 else f32_array(x + 4 * token * len(zeros), len(zeros))


def gather(is_bf16, x, tokens, first, last, hidden, rows):
    """Rows ``first`` to ``last`` = x of their tokens, zeros where that is -1."""
    token = addresses.i64_array(tokens, last)
    row_bytes = hidden * (2 if is_bf16 else 4)
    zeros = np.zeros(hidden, np.float32)
    for q in range(first, last):
        store(is_bf16, row_of(x, token[q], zeros), rows + q * row_bytes)


def activate_rows(
    is_bf16, kind, limit, alpha, bias, width, gate, up, num_rows, num_cols, act, act_row_bytes
):
    """act = f(gate + bias, up + bias); ``gate`` and ``up`` are [num_rows, num_cols], ``act`` wider.

    ``bias``: the first column's for gate, up's ``width`` further; 0: none.
    """
    whole = (num_cols + CHUNK - 1) // CHUNK * CHUNK
    gates, ups = np.zeros(whole, np.float32), np.zeros(whole, np.float32)
    results = np.empty(whole, np.float32)
    row_bytes = num_cols * (2 if is_bf16 else 4)
    up_bias = bias + 4 * width if bias != 0 else 0
    for q in range(num_rows):
        load(is_bf16, gate + q * row_bytes, bias, gates[:num_cols])
        load(is_bf16, up + q * row_bytes, up_bias, ups[:num_cols])
        for at in range(0, 4 * whole, 4 * CHUNK):
            from_gate, from_up = gates.ctypes.data + at, ups.ctypes.data + at
            activate(kind, limit, alpha, from_gate, from_up, results.ctypes.data + at)
        store(is_bf16, results[:num_cols], act + q * act_row_bytes)


def add_up(is_bf16, down, tokens, weights, num_rows, bias, hidden, first, last, out):
    """out[token, first:last] += weight * (down + bias), one expert's rows after the other."""
    token, weight = i64_array(tokens, num_rows), f32_array(weights, num_rows)
    row = np.empty(last - first, np.float32)
    size = 2 if is_bf16 else 4
    for q in range(num_rows):
        at = bias + 4 * first if bias != 0 else 0
        load(is_bf16, down + (q * hidden + first) * size, at, row)
        sums = f32_array(out + 4 * (token[q] * hidden + first), last - first)
        for k in range(len(sums)):
            sums[k] += weight[q] * row[k]


@functools.cache
def row_kernels() -> RowKernels:
    """The kernels; the first call on a machine compiles them."""
    entries: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "run_stage": (run_stage, (_INT,) * 5),
        "flush_denormals": (flush_denormals, ()),
        "set_modes": (set_modes, (types.int32,)),
        "gather": (gather, (_BOOL, *(_INT,) * 6)),
        "activate": (activate_rows, (_BOOL, _INT, _F32, _F32, *(_INT,) * 8)),
        "add_up": (add_up, (_BOOL, *(_INT,) * 9)),
    }
    return RowKernels(
        **{name: compile_entry(stamped(f), signature) for name, (f, signature) in entries.items()}
    )

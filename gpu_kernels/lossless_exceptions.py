"""Exceptions of bf12 weights: a few more columns of a product, read from the lists of its blocks.

The rows' lists, one after the other in the tile's order of rows, are the tile's list. Of normal
numbers a block of 16 rows by 2048 columns has 5.
Shapes: M rows of a tile, L places of the tile's list, N columns (tokens).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.packed_tile import wait_for_products


@triton.jit
def load_lists(w_ptr, offset_M, row_M, SPEC: tl.constexpr):
    """What of its block's list each row has: the first entry and one beyond the last, ``[M]``."""
    OFFSET: tl.constexpr = SPEC.scale_offset + 32
    place_M = row_M % 16
    end_ptr_M = (w_ptr + OFFSET + offset_M).to(tl.pointer_type(tl.uint16)) + place_M
    begin_M = tl.load(end_ptr_M - 1, mask=place_M > 0, other=0)
    return begin_M.to(tl.int32), tl.load(end_ptr_M).to(tl.int32)


@triton.jit
def join_lists(begin_M, end_M, offset_M, SPEC: tl.constexpr):
    """What of the tile's list each row has: the first entry, one beyond the last, where they lie.

    Entry e of the list is word ``where + e`` of the matrix.
    """
    OFFSET: tl.constexpr = (SPEC.scale_offset + 64) // 4
    last_M = tl.cumsum(end_M - begin_M, 0)
    first_M = last_M - (end_M - begin_M)
    return first_M, last_M, offset_M // 4 + OFFSET + begin_M - first_M


@triton.jit
def add_exceptions(
    a_MN,
    b_MN,
    w_ptr,
    a_lists,
    b_lists,
    begin,
    end,
    x_ptr,
    x_offset_N,
    is_used_N,
    SPEC: tl.constexpr,
):
    """Both tiles' products with those of their lists that have columns in ``begin .. end`` added.

    Both lists at once, since one waits for an entry, and then for its column of x.
    """
    num = tl.maximum(tl.max(a_lists[1], 0), tl.max(b_lists[1], 0))
    for e in tl.range(0, num, 16, num_stages=1):
        if SPEC.waits:
            wait_for_products()
        a_ML, a_column_L = _load_entries(w_ptr, e, a_lists)
        b_ML, b_column_L = _load_entries(w_ptr, e, b_lists)
        a_x_LN = _load_columns(x_ptr, x_offset_N, is_used_N, a_column_L, begin, end)
        b_x_LN = _load_columns(x_ptr, x_offset_N, is_used_N, b_column_L, begin, end)
        a_MN = tl.dot(a_ML.to(a_x_LN.dtype), a_x_LN, a_MN, input_precision="ieee")
        b_MN = tl.dot(b_ML.to(b_x_LN.dtype), b_x_LN, b_MN, input_precision="ieee")
    return a_MN, b_MN


@triton.jit
def _load_entries(w_ptr, e, lists):
    """16 entries of a tile's list, weights ``[M, L]`` and their columns (-1: no entry)."""
    first_M, last_M, where_M = lists
    e_ML = e + tl.arange(0, 16)[None, :]
    # each row reads what it has: Triton 3.6 would read and find a single row of entries many times
    is_its_ML = (first_M[:, None] <= e_ML) & (e_ML < last_M[:, None])
    entry_ptr_ML = w_ptr.to(tl.pointer_type(tl.int32)) + where_M[:, None] + e_ML
    entry_ML = tl.load(entry_ptr_ML, mask=is_its_ML, other=0)
    column_L = tl.max(tl.where(is_its_ML, entry_ML & 0xFFFF, -1), 0)
    return (entry_ML & -0x10000).to(tl.float32, bitcast=True), column_L


@triton.jit
def _load_columns(x_ptr, x_offset_N, is_used_N, column_L, begin, end):
    """What weights of columns ``column_L`` are multiplied by, ``[L, N]``; 0 for other columns."""
    is_here_L = (begin <= column_L) & (column_L < end)
    x_ptr_NL = x_ptr + x_offset_N[:, None] + column_L[None, :]
    return tl.trans(tl.load(x_ptr_NL, mask=is_used_N[:, None] & is_here_L[None, :], other=0.0))

"""One program's share of an expert: two tiles of weight rows times some tokens' columns.

The weights are the left operand, so that few tokens fill a product, and both tiles share one read
of the columns. What is compiled is said by a ``TileSpec``. Rows and blocks beyond a matrix are read
as its last ones and never stored, so that no loop needs a mask for them. With ``SPEC.unit`` only
the last rows of w13 and columns of w2 are read: ``first`` is then the first of them, else None.
A few more columns (F) may share the weights, read and decoded once: where N are just too few, a
second program would read all of them again.
Shapes: M rows of each tile, N columns, F more of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.dense_products import dense_products
from gpu_kernels.gated_activation import activate
from gpu_kernels.lossless_products import lossless_products
from gpu_kernels.packed_products import packed_products
from gpu_kernels.packed_tile import tile_row


@triton.jit
def expert_tile(
    w_ptr,
    bias_ptr,
    x_ptr,
    out_ptr,
    tile,
    split,
    first,
    x_offset_N,
    out_offset_N,
    is_used_N,
    SPEC: tl.constexpr,
    x_offset_F=None,
    out_offset_F=None,
    is_used_F=None,
):
    """Multiply and store tile ``tile`` of one slot's matrix; ``w_ptr`` and ``bias_ptr`` are its.

    Of the depth only part ``split`` of ``SPEC.splits`` is taken; the first adds the bias.

    ``x_offset_N`` and ``out_offset_N`` (int64) say where a column's input and output row begin;
    columns not used are neither read nor written. More columns may follow, or None.
    """
    M: tl.constexpr = SPEC.tile_rows
    PAIRED: tl.constexpr = SPEC.paired
    first_row = tile * (M if PAIRED else 2 * M)
    if PAIRED and SPEC.unit != 0:
        first_row += first
    begin = None if PAIRED or SPEC.unit == 0 else first
    if SPEC.bits == 0:
        a_MN, b_MN, a_MF, b_MF = dense_products(
            w_ptr,
            first_row,
            split,
            begin,
            x_ptr,
            x_offset_N,
            is_used_N,
            x_offset_F,
            is_used_F,
            SPEC,
        )
        a_row_M = first_row + tl.arange(0, M)
    elif SPEC.bits == 12:
        a_MN, b_MN, a_MF, b_MF = lossless_products(
            w_ptr,
            first_row,
            split,
            begin,
            x_ptr,
            x_offset_N,
            is_used_N,
            x_offset_F,
            is_used_F,
            SPEC,
        )
        a_row_M = first_row + tile_row(tl.arange(0, M), SPEC)
    else:
        a_MN, b_MN, a_MF, b_MF = packed_products(
            w_ptr,
            first_row,
            split,
            begin,
            x_ptr,
            x_offset_N,
            is_used_N,
            x_offset_F,
            is_used_F,
            SPEC,
        )
        a_row_M = first_row + tile_row(tl.arange(0, M), SPEC)
    _store(a_MN, b_MN, a_row_M, split, bias_ptr, out_ptr, out_offset_N, is_used_N, SPEC)
    if is_used_F is not None:
        _store(a_MF, b_MF, a_row_M, split, bias_ptr, out_ptr, out_offset_F, is_used_F, SPEC)


@triton.jit
def _store(
    a_MN,
    b_MN,
    a_row_M,
    split,
    bias_ptr,
    out_ptr,
    out_offset_N,
    is_used_N,
    SPEC: tl.constexpr,
):
    """Add the bias, apply the activation where there is one, and write both tiles' products."""
    ROWS: tl.constexpr = SPEC.rows
    PAIRED: tl.constexpr = SPEC.paired
    ACTIVATION: tl.constexpr = SPEC.activation
    b_row_M = a_row_M if PAIRED else a_row_M + SPEC.tile_rows
    a_mask_M = a_row_M < ROWS
    b_mask_M = b_row_M < ROWS
    if bias_ptr is not None:
        b_bias_ptr = bias_ptr + (ROWS if PAIRED else 0)
        is_first = split == 0
        a_MN += tl.load(bias_ptr + a_row_M, mask=a_mask_M & is_first, other=0.0)[:, None]
        b_MN += tl.load(b_bias_ptr + b_row_M, mask=b_mask_M & is_first, other=0.0)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    out_ptr_1N = (out_ptr + out_offset_N)[None, :]
    a_mask_MN = a_mask_M[:, None] & is_used_N[None, :]
    if PAIRED:
        act_MN = activate(a_MN, b_MN, ACTIVATION)
        tl.store(out_ptr_1N + a_row_M[:, None], act_MN.to(dtype), mask=a_mask_MN)
    else:
        b_mask_MN = b_mask_M[:, None] & is_used_N[None, :]
        tl.store(out_ptr_1N + a_row_M[:, None], a_MN.to(dtype), mask=a_mask_MN)
        tl.store(out_ptr_1N + b_row_M[:, None], b_MN.to(dtype), mask=b_mask_MN)

"""Two tiles of an expert's bf12 weights times some columns.

A step's weights are read and decoded once for two sets of columns: N and, where there are any, F
more. Behind the last step come the exceptions of both tiles, as columns of 16 more.
Shapes: M rows of each tile, N columns, F more of them, D depth of a step, L exceptions at a time,
B blocks of 16 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.expert_columns import load_columns
from gpu_kernels.lossless_exceptions import add_exceptions, join_lists, load_lists
from gpu_kernels.lossless_tile import decode_steps, load_scales, load_steps, order_steps
from gpu_kernels.packed_tile import block_offset, tile_row, wait_for_products
from gpu_kernels.split_depth import part_of_depth


@triton.jit
def lossless_products(
    w_ptr,
    first_row,
    split,
    begin,
    x_ptr,
    x_offset_N,
    is_used_N,
    x_offset_F,
    is_used_F,
    SPEC: tl.constexpr,
):
    """Both tiles times the columns, float32 ``[M, N]`` and ``[M, F]``, of bf12 weights.

    The depth starts at ``begin``, a multiple of 64; None: at 0. Without more columns the first
    stand in for them.
    """
    M: tl.constexpr = SPEC.tile_rows
    N: tl.constexpr = SPEC.columns
    STEP: tl.constexpr = SPEC.step
    DEPTH: tl.constexpr = SPEC.depth
    row_M = tile_row(tl.arange(0, M), SPEC)
    first_block = first_row // 16
    a_ptr_B = w_ptr + block_offset(first_block + tl.arange(0, M // 16), 0, SPEC)
    b_ptr_B = w_ptr + block_offset(first_block + tl.arange(0, M // 16), 1, SPEC)
    a_offset_M = block_offset(first_block + row_M // 16, 0, SPEC)
    b_offset_M = block_offset(first_block + row_M // 16, 1, SPEC)
    a_scale_M = load_scales(w_ptr + a_offset_M, row_M, SPEC)
    b_scale_M = load_scales(w_ptr + b_offset_M, row_M, SPEC)
    # read before the steps, so that nobody waits for them behind these
    a_begin_M, a_end_M = load_lists(w_ptr, a_offset_M, row_M, SPEC)
    b_begin_M, b_end_M = load_lists(w_ptr, b_offset_M, row_M, SPEC)
    a_MN = tl.zeros([M, N], tl.float32)
    b_MN = tl.zeros([M, N], tl.float32)
    if is_used_F is not None:
        a_MF = tl.zeros([M, is_used_F.shape[0]], tl.float32)
        b_MF = tl.zeros([M, is_used_F.shape[0]], tl.float32)
    start, length = part_of_depth(split, begin, 1, SPEC)
    end = tl.minimum(start + length, DEPTH)
    for first in range(start, end, STEP):
        if SPEC.waits:
            wait_for_products()
        x_ND = load_columns(x_ptr, x_offset_N, is_used_N, first, STEP, SPEC)
        x_DN = tl.trans(order_steps(x_ND, SPEC))
        if is_used_F is not None:
            x_FD = load_columns(x_ptr, x_offset_F, is_used_F, first, STEP, SPEC)
            x_DF = tl.trans(order_steps(x_FD, SPEC))
        a0_MS, a1_MS, a2_MS = load_steps(a_ptr_B, first, SPEC)
        b0_MS, b1_MS, b2_MS = load_steps(b_ptr_B, first, SPEC)
        # the second tile is decoded while the first is multiplied
        a_MD = decode_steps(a0_MS, a1_MS, a2_MS, a_scale_M, x_DN.dtype, SPEC)
        a_MN = tl.dot(a_MD, x_DN, a_MN, input_precision="ieee")
        if is_used_F is not None:
            a_MF = tl.dot(a_MD, x_DF, a_MF, input_precision="ieee")
        b_MD = decode_steps(b0_MS, b1_MS, b2_MS, b_scale_M, x_DN.dtype, SPEC)
        b_MN = tl.dot(b_MD, x_DN, b_MN, input_precision="ieee")
        if is_used_F is not None:
            b_MF = tl.dot(b_MD, x_DF, b_MF, input_precision="ieee")
    a_lists = join_lists(a_begin_M, a_end_M, a_offset_M, SPEC)
    b_lists = join_lists(b_begin_M, b_end_M, b_offset_M, SPEC)
    a_MN, b_MN = add_exceptions(
        a_MN, b_MN, w_ptr, a_lists, b_lists, start, end, x_ptr, x_offset_N, is_used_N, SPEC
    )
    if is_used_F is not None:
        a_MF, b_MF = add_exceptions(
            a_MF, b_MF, w_ptr, a_lists, b_lists, start, end, x_ptr, x_offset_F, is_used_F, SPEC
        )
    if is_used_F is None:
        return a_MN, b_MN, a_MN, b_MN
    else:
        return a_MN, b_MN, a_MF, b_MF

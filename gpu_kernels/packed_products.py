"""Two tiles of an expert's packed weights times some columns.

Blocks beyond a matrix are read as its last one. The weights of a step are read and decoded once for
two sets of columns: N and, where there are any, F more.
Shapes: M rows of each tile, N columns, F more of them, D depth of a unit, B blocks of 16 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.expert_columns import load_columns
from gpu_kernels.packed_tile import (
    block_offset,
    decode_words,
    load_group,
    load_words,
    order_depth,
    tile_row,
    wait_for_products,
)
from gpu_kernels.split_depth import part_of_depth


@triton.jit
def packed_products(
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
    """Both tiles times the columns, float32 ``[M, N]`` and ``[M, F]``, of packed weights.

    A unit is the depth that one scale covers, or a step if that is less; a step is some units.
    The depth starts at ``begin``, where a unit does; None: at 0. Without more columns the first
    stand in for them.
    """
    M: tl.constexpr = SPEC.tile_rows
    N: tl.constexpr = SPEC.columns
    STEP: tl.constexpr = SPEC.step
    GROUP: tl.constexpr = SPEC.group
    DEPTH: tl.constexpr = SPEC.depth
    UNIT: tl.constexpr = STEP if STEP < GROUP else GROUP
    NUM_UNITS: tl.constexpr = (DEPTH + UNIT - 1) // UNIT
    WORDS: tl.constexpr = UNIT * SPEC.bits // 32
    first_unit, length = part_of_depth(split, begin, UNIT, SPEC)
    row_M = tile_row(tl.arange(0, M), SPEC)
    first_block = first_row // 16
    a_ptr_B = w_ptr + block_offset(first_block + tl.arange(0, M // 16), 0, SPEC)
    b_ptr_B = w_ptr + block_offset(first_block + tl.arange(0, M // 16), 1, SPEC)
    a_ptr_M = w_ptr + block_offset(first_block + row_M // 16, 0, SPEC)
    b_ptr_M = w_ptr + block_offset(first_block + row_M // 16, 1, SPEC)
    first_group = tl.minimum(first_unit, NUM_UNITS - 1) * UNIT // GROUP
    a_scale_M, a_zero_M = load_group(a_ptr_M, row_M, first_group, SPEC)
    b_scale_M, b_zero_M = load_group(b_ptr_M, row_M, first_group, SPEC)
    a_MN = tl.zeros([M, N], tl.float32)
    b_MN = tl.zeros([M, N], tl.float32)
    if is_used_F is not None:
        a_MF = tl.zeros([M, is_used_F.shape[0]], tl.float32)
        b_MF = tl.zeros([M, is_used_F.shape[0]], tl.float32)
    for first in range(first_unit, tl.minimum(first_unit + length, NUM_UNITS), STEP // UNIT):
        if SPEC.waits:
            wait_for_products()
        for part in tl.static_range(STEP // UNIT):
            # beyond the last unit the columns are 0: any weights will do
            unit = tl.minimum(first + part, NUM_UNITS - 1)
            depth = (first + part) * UNIT
            x_ND = load_columns(x_ptr, x_offset_N, is_used_N, depth, UNIT, SPEC)
            x_DN = tl.trans(order_depth(x_ND, SPEC))
            if is_used_F is not None:
                x_FD = load_columns(x_ptr, x_offset_F, is_used_F, depth, UNIT, SPEC)
                x_DF = tl.trans(order_depth(x_FD, SPEC))
            a_words_MS = load_words(a_ptr_B, unit * WORDS, WORDS, SPEC)
            b_words_MS = load_words(b_ptr_B, unit * WORDS, WORDS, SPEC)
            # read a unit ahead, since loads of 2 bytes do not join the asynchronous copies
            group = tl.minimum(unit + 1, NUM_UNITS - 1) * UNIT // GROUP
            next_a_scale_M, next_a_zero_M = load_group(a_ptr_M, row_M, group, SPEC)
            next_b_scale_M, next_b_zero_M = load_group(b_ptr_M, row_M, group, SPEC)
            # the second tile is decoded while the first is multiplied
            a_MD = _decode(a_words_MS, a_scale_M, a_zero_M, x_DN.dtype, SPEC)
            sum_MN = _column_sums(x_DN, SPEC)
            a_MN = _add_product(a_MD, a_scale_M, a_zero_M, x_DN, sum_MN, a_MN, SPEC)
            if is_used_F is not None:
                sum_MF = _column_sums(x_DF, SPEC)
                a_MF = _add_product(a_MD, a_scale_M, a_zero_M, x_DF, sum_MF, a_MF, SPEC)
            b_MD = _decode(b_words_MS, b_scale_M, b_zero_M, x_DN.dtype, SPEC)
            b_MN = _add_product(b_MD, b_scale_M, b_zero_M, x_DN, sum_MN, b_MN, SPEC)
            if is_used_F is not None:
                b_MF = _add_product(b_MD, b_scale_M, b_zero_M, x_DF, sum_MF, b_MF, SPEC)
            a_scale_M, a_zero_M = next_a_scale_M, next_a_zero_M
            b_scale_M, b_zero_M = next_b_scale_M, next_b_zero_M
    if is_used_F is None:
        return a_MN, b_MN, a_MN, b_MN
    else:
        return a_MN, b_MN, a_MF, b_MF


@triton.jit
def _decode(words_MS, scale_M, zero_M, DTYPE: tl.constexpr, SPEC: tl.constexpr):
    """What enters a product, ``[M, D]``: codes minus their middle in registers, else weights."""
    if SPEC.in_registers:
        return decode_words(words_MS, 1 << (SPEC.bits - 1), DTYPE, SPEC)
    else:
        codes_MD = decode_words(words_MS, zero_M[:, None], DTYPE, SPEC)
        return codes_MD * scale_M.to(DTYPE)[:, None]


@triton.jit
def _column_sums(x_DN, SPEC: tl.constexpr):
    """Each column's sum, in every row ``[M, N]``; a number where none is needed."""
    if SPEC.in_registers and SPEC.has_zeros:
        # the product's own layout, without exchange
        ones_MD = tl.full([SPEC.tile_rows, x_DN.shape[0]], 1.0, x_DN.dtype)
        return tl.dot(ones_MD, x_DN, input_precision="ieee")
    else:
        return 0.0


@triton.jit
def _add_product(weights_MD, scale_M, zero_M, x_DN, x_sum_MN, total_MN, SPEC: tl.constexpr):
    """``total_MN`` plus the product of one unit."""
    if SPEC.in_registers:
        MIDDLE: tl.constexpr = 1 << (SPEC.bits - 1)
        product_MN = tl.dot(weights_MD, x_DN, input_precision="ieee")
        if SPEC.has_zeros:
            product_MN += (MIDDLE - zero_M).to(tl.float32)[:, None] * x_sum_MN
        return total_MN + product_MN * scale_M[:, None]
    else:
        return tl.dot(weights_MD, x_DN, total_MN, input_precision="ieee")

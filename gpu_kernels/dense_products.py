"""Two tiles of an expert's row-major weights times some columns.

Rows beyond a matrix are read as its last ones. The weights of a step are read once for two sets of
columns: N and, where there are any, F more.
Shapes: M rows of each tile, N columns, F more of them, D depth of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.expert_columns import load_columns
from gpu_kernels.split_depth import part_of_depth


@triton.jit
def dense_products(
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
    """Both tiles times the columns, float32 ``[M, N]`` and ``[M, F]``, of row-major weights.

    The depth starts at ``begin``; None: at 0. Without more columns the first stand in for them.
    """
    M: tl.constexpr = SPEC.tile_rows
    N: tl.constexpr = SPEC.columns
    STEP: tl.constexpr = SPEC.step
    DEPTH: tl.constexpr = SPEC.depth
    ROWS: tl.constexpr = SPEC.rows
    PAIRED: tl.constexpr = SPEC.paired
    d_D = tl.arange(0, STEP)
    a_row_M = tl.minimum(first_row + tl.arange(0, M), ROWS - 1)
    b_row_M = first_row + (ROWS if PAIRED else M) + tl.arange(0, M)
    b_row_M = tl.minimum(b_row_M, 2 * ROWS - 1 if PAIRED else ROWS - 1)
    a_ptr_MD = w_ptr + a_row_M[:, None] * DEPTH + d_D[None, :]
    b_ptr_MD = w_ptr + b_row_M[:, None] * DEPTH + d_D[None, :]
    a_MN = tl.zeros([M, N], tl.float32)
    b_MN = tl.zeros([M, N], tl.float32)
    if is_used_F is not None:
        a_MF = tl.zeros([M, is_used_F.shape[0]], tl.float32)
        b_MF = tl.zeros([M, is_used_F.shape[0]], tl.float32)
    start, length = part_of_depth(split, begin, 1, SPEC)
    for first in tl.range(start, tl.minimum(start + length, DEPTH), STEP, disable_licm=True):
        x_ND = load_columns(x_ptr, x_offset_N, is_used_N, first, STEP, SPEC)
        if is_used_F is not None:
            x_FD = load_columns(x_ptr, x_offset_F, is_used_F, first, STEP, SPEC)
        if SPEC.is_ragged:
            mask_1D = (first + d_D < DEPTH)[None, :]
            a_MD = tl.load(a_ptr_MD + first, mask=mask_1D, other=0.0)
            b_MD = tl.load(b_ptr_MD + first, mask=mask_1D, other=0.0)
        else:
            a_MD = tl.load(a_ptr_MD + first)
            b_MD = tl.load(b_ptr_MD + first)
        # bf16 weights of float32 columns are widened, which is exact
        a_MN = tl.dot(a_MD.to(x_ND.dtype), tl.trans(x_ND), a_MN, input_precision="ieee")
        b_MN = tl.dot(b_MD.to(x_ND.dtype), tl.trans(x_ND), b_MN, input_precision="ieee")
        if is_used_F is not None:
            a_MF = tl.dot(a_MD.to(x_ND.dtype), tl.trans(x_FD), a_MF, input_precision="ieee")
            b_MF = tl.dot(b_MD.to(x_ND.dtype), tl.trans(x_FD), b_MF, input_precision="ieee")
    if is_used_F is None:
        return a_MN, b_MN, a_MN, b_MN
    else:
        return a_MN, b_MN, a_MF, b_MF

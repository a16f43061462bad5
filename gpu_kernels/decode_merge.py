"""The second launch of decode attention: the parts of each row, weighted by their sums.

Shapes: U units, W parts read at once, D dims of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.attention_variant import IN_KERNEL_LOG2_E
from gpu_kernels.split_kv import items_of_units, parts_of

# Read at once: the 66 to 132 parts of one long request in two steps, by enough programs.
MERGE_PARTS, MERGE_DIMS = 64, 32


@triton.jit(do_not_specialize=["num_units", "num_programs", "window_left"])
def merge_kernel(
    indptr_ptr,
    last_page_len_ptr,
    first_ptr,
    count_ptr,
    request_ptr,
    part_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    out_lse_ptr,
    num_units,
    num_programs,
    window_left,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """One packed row of one unit, some of its dims: parts weighted by 2 ** lse_log2."""
    unit = tl.program_id(0)
    kv_head = tl.program_id(1) // ROWS
    row = tl.program_id(1) % ROWS
    query = unit
    if HAS_BLOCKS:
        query = tl.load(first_ptr + unit) + row // GROUP
        if row >= tl.load(count_ptr + unit) * GROUP:
            return
    head = kv_head * GROUP + row % GROUP
    items_U, ends_U, total = items_of_units(
        indptr_ptr,
        last_page_len_ptr,
        request_ptr,
        num_units,
        window_left,
        PAGE_SIZE,
        BLOCK_N,
        BLOCK_U,
        SPLIT_TILES,
        HAS_BLOCKS,
        HAS_WINDOW,
    )
    is_mine_U = tl.arange(0, BLOCK_U) == unit
    unit_end = tl.sum(tl.where(is_mine_U, ends_U, 0))
    unit_begin = unit_end - tl.sum(tl.where(is_mine_U, items_U, 0))
    first_part, end_part = parts_of(unit, unit_begin, unit_end, total, num_programs, SPLIT_TILES)

    num_kv_heads = tl.num_programs(1) // ROWS
    d_D = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    running_max = float("-inf")
    weight_sum = 0.0
    if HAS_SINKS:
        running_max = tl.load(sinks_ptr + head) * IN_KERNEL_LOG2_E
        weight_sum = 1.0
    acc_D = tl.zeros([BLOCK_D], tl.float32)
    for first in range(first_part, end_part, BLOCK_W):
        part_W = first + tl.arange(0, BLOCK_W)
        part_row_W = (part_W.to(tl.int64) * num_kv_heads + kv_head) * ROWS + row
        lse_W = tl.load(lse_ptr + part_row_W, mask=part_W < end_part, other=float("-inf"))
        mask_WD = (part_W < end_part)[:, None] & (d_D < HEAD_DIM)[None, :]
        part_WD = tl.load(part_ptr + part_row_W[:, None] * HEAD_DIM + d_D, mask=mask_WD, other=0.0)
        new_max = tl.maximum(running_max, tl.max(lse_W, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight_W = tl.exp2(lse_W - base)
        decay = tl.exp2(running_max - base)
        acc_D = acc_D * decay + tl.sum(weight_W[:, None] * part_WD, 0)
        weight_sum = weight_sum * decay + tl.sum(weight_W, 0)
        running_max = new_max
    safe_sum = tl.where(weight_sum > 0.0, weight_sum, 1.0)
    offset_D = query.to(tl.int64) * stride_token + head * stride_head + d_D
    out_D = (acc_D / safe_sum).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset_D, out_D, mask=d_D < HEAD_DIM)
    if HAS_LSE:
        lse_log2 = tl.where(weight_sum > 0.0, running_max + tl.log2(safe_sum), float("-inf"))
        lse_ptr = out_lse_ptr + query * num_kv_heads * GROUP + head
        tl.store(lse_ptr, lse_log2, mask=tl.program_id(2) == 0)

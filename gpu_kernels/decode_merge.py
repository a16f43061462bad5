"""The second launch of decode attention: the parts of each row, weighted by their sums.

Shapes: U units, W parts read at once, R packed rows of a unit, D dims of a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.attention_variant import IN_KERNEL_LOG2_E
from gpu_kernels.dependent_launch import let_next_start, wait_for_last
from gpu_kernels.split_kv import queries_of_unit
from gpu_kernels.whole_numbers import next_power_of_2

MERGE_DIMS = 32
FEW_ROWS = 1024
MOST_PARTS = 256  # read at once: 32 KiB, 32 numbers a thread


def merge_tile(num_units: int, num_kv_heads: int, rows: int, num_programs: int) -> dict[str, int]:
    """Parts and rows that a program of the merge reads at once, and its warps.

    With few rows in all they are a few long requests', each with its share of the parts that
    ``num_programs`` made, which many programs must read in one step, as a second waits for memory
    again. With many rows the parts of each are few, and programs would only queue.
    """
    if num_units * num_kv_heads * rows <= FEW_ROWS:
        parts = min(max(next_power_of_2(num_programs // num_units + 1), 64), MOST_PARTS)
        return {"BLOCK_W": parts, "BLOCK_R": 1, "num_warps": max(parts // 32, 4)}
    return {"BLOCK_W": 8, "BLOCK_R": min(8, next_power_of_2(rows)), "num_warps": 1}


@triton.jit
def merge_kernel(
    ranges_ptr,
    first_ptr,
    count_ptr,
    part_ptr,
    lse_ptr,
    sinks_ptr,
    out_ptr,
    out_lse_ptr,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some rows of one unit, some of their dims: parts weighted by 2 ** lse_log2.

    ``ranges_ptr``: each unit's first part and the end of its parts, int32 [U, 2].
    """
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_R - 1) // BLOCK_R
    unit = tl.program_id(0)
    kv_head = tl.program_id(1) // ROW_BLOCKS
    row_R = tl.program_id(1) % ROW_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R)
    first_query, count = queries_of_unit(first_ptr, count_ptr, unit, HAS_BLOCKS)
    is_row_R = row_R < count * GROUP
    head_R = kv_head * GROUP + row_R % GROUP
    first_part = tl.load(ranges_ptr + 2 * unit)
    end_part = tl.load(ranges_ptr + 2 * unit + 1)

    num_kv_heads = tl.num_programs(1) // ROW_BLOCKS
    d_D = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    max_R = tl.full([BLOCK_R], float("-inf"), tl.float32)
    sum_R = tl.zeros([BLOCK_R], tl.float32)
    if HAS_SINKS:
        max_R = tl.load(sinks_ptr + head_R, mask=is_row_R, other=0.0) * IN_KERNEL_LOG2_E
        sum_R += 1.0
    acc_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    mask_RD = is_row_R[:, None] & (d_D < HEAD_DIM)[None, :]
    for first in range(first_part, end_part, BLOCK_W):
        part_W = first + tl.arange(0, BLOCK_W)
        is_part_W = part_W < end_part
        part_row_WR = ((part_W.to(tl.int64) * num_kv_heads + kv_head) * ROWS)[:, None] + row_R
        mask_WR = is_part_W[:, None] & is_row_R[None, :]
        lse_WR = tl.load(lse_ptr + part_row_WR, mask=mask_WR, other=float("-inf"))
        mask_WRD = is_part_W[:, None, None] & mask_RD[None, :, :]
        part_ptr_WRD = part_ptr + part_row_WR[:, :, None] * HEAD_DIM + d_D
        part_WRD = tl.load(part_ptr_WRD, mask=mask_WRD, other=0.0)
        new_max_R = tl.maximum(max_R, tl.max(lse_WR, 0))
        base_R = tl.where(new_max_R == float("-inf"), 0.0, new_max_R)
        weight_WR = tl.exp2(lse_WR - base_R[None, :])
        decay_R = tl.exp2(max_R - base_R)
        acc_RD = acc_RD * decay_R[:, None] + tl.sum(weight_WR[:, :, None] * part_WRD, 0)
        sum_R = sum_R * decay_R + tl.sum(weight_WR, 0)
        max_R = new_max_R
    safe_R = tl.where(sum_R > 0.0, sum_R, 1.0)
    query_R = (first_query + row_R // GROUP).to(tl.int64)
    offset_RD = (query_R * stride_token + head_R * stride_head)[:, None] + d_D
    out_RD = (acc_RD / safe_R[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset_RD, out_RD, mask=mask_RD)
    if HAS_LSE:
        lse_R = tl.where(sum_R > 0.0, max_R + tl.log2(safe_R), float("-inf"))
        lse_ptr_R = out_lse_ptr + query_R * num_kv_heads * GROUP + head_R
        tl.store(lse_ptr_R, lse_R, mask=is_row_R & (tl.program_id(2) == 0))

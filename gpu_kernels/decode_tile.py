"""The first launch of decode attention: each program's share of the tiles, a part of every unit.

Memory-bound: each program reads an equal share of all tiles of one KV head once, for all query
heads of its group (packed as rows so that the products run on tensor cores).
Shapes: U units (see split_kv), M packed rows of a unit, Q rows of q as the tile takes them, D head
dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.attention_variant import IN_KERNEL_LOG2_E
from gpu_kernels.coded_tile import attend_codes
from gpu_kernels.dependent_launch import let_next_start, wait_for_last
from gpu_kernels.paged_tile import attend, finish_softmax, head_dims, request_extent
from gpu_kernels.split_kv import items_of_units, parts_of, queries_of_unit, share_of


@triton.jit(do_not_specialize=["num_units", "window_left"])
def decode_kernel(
    q_ptr,
    kv_ptr,
    kv_scales_ptr,
    indptr_ptr,
    indices_ptr,
    last_page_len_ptr,
    first_ptr,
    count_ptr,
    request_ptr,
    positions_ptr,
    slopes_ptr,
    ranges_ptr,
    part_ptr,
    lse_ptr,
    num_units,
    window_left,
    scale_log2,
    cap_log2,
    stride_q_token,
    stride_q_head,
    stride_page: tl.constexpr,
    stride_v: tl.constexpr,
    stride_token: tl.constexpr,
    stride_kv_head: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    START_TILES: tl.constexpr,
    IS_QUANTISED: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    IN_CODES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
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
        IN_CODES,
    )
    item, last_item = share_of(
        program, tl.num_programs(0), items_U, total, SPLIT_TILES, START_TILES
    )
    if program + kv_head == 0:
        _store_ranges(ranges_ptr, num_units, items_U, ends_U, total, SPLIT_TILES, START_TILES)
    d_D, is_dim_D = head_dims(HEAD_DIM, BLOCK_D, IS_INT4)
    row_M = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUP + row_M % GROUP
    slope_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope_M = tl.load(slopes_ptr + head_M) * IN_KERNEL_LOG2_E
    while item < last_item:
        unit, part, first_tile, end_tile, item = _next_part(
            program, item, last_item, items_U, ends_U, SPLIT_TILES
        )
        request = tl.load(request_ptr + unit) if HAS_BLOCKS else unit
        first_query, count = queries_of_unit(first_ptr, count_ptr, unit, HAS_BLOCKS)
        first_entry, kv_len = request_extent(indptr_ptr, last_page_len_ptr, request, PAGE_SIZE)
        first_pos = tl.maximum(kv_len - 1 - window_left, 0) if HAS_WINDOW else 0
        origin = first_pos // BLOCK_N * BLOCK_N if IN_CODES else first_pos
        begin = origin + first_tile * BLOCK_N
        end = tl.minimum(origin + end_tile * BLOCK_N, kv_len)
        query_M = first_query + row_M // GROUP
        is_row_M = row_M < count * GROUP
        position_M = tl.zeros([BLOCK_M], tl.int32) + kv_len - 1
        if HAS_POSITIONS:
            position_M = tl.load(positions_ptr + query_M, mask=is_row_M, other=0)
        mask_MD = is_row_M[:, None] & is_dim_D[None, :]
        q_QD = _load_queries(
            q_ptr,
            first_query,
            count,
            kv_head,
            d_D,
            is_dim_D,
            stride_q_token,
            stride_q_head,
            GROUP,
            BLOCK_M,
            IN_CODES,
        )
        if IN_CODES:
            max_M, sum_M, acc_MD = attend_codes(
                q_QD,
                kv_ptr + kv_head * stride_kv_head,
                kv_scales_ptr + kv_head * PAGE_SIZE,
                indices_ptr + first_entry,
                begin,
                end,
                first_pos,
                position_M,
                slope_M,
                stride_page,
                stride_v,
                stride_token,
                num_kv_heads * PAGE_SIZE,
                scale_log2,
                cap_log2,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_N,
                BLOCK_D,
                IS_FP8,
                IS_INT4,
                HAS_CAP,
                HAS_ALIBI,
                HAS_POSITIONS,
            )
        else:
            max_M, sum_M, acc_MD = attend(
                q_QD,
                kv_ptr + kv_head * stride_kv_head,
                kv_scales_ptr + kv_head * PAGE_SIZE if IS_QUANTISED else kv_scales_ptr,
                indices_ptr + first_entry,
                begin,
                end,
                position_M,
                tl.zeros([BLOCK_M], tl.int32),
                slope_M,
                row_M,
                tl.full([BLOCK_M], float("-inf"), tl.float32),
                tl.zeros([BLOCK_M], tl.float32),
                tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
                stride_page,
                stride_v,
                stride_token,
                num_kv_heads * PAGE_SIZE,
                scale_log2,
                cap_log2,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_N,
                BLOCK_D,
                IS_QUANTISED,
                IS_INT4,
                HAS_CAP,
                HAS_ALIBI,
                False,
                HAS_POSITIONS,
                True,
            )
        part_MD, lse_log2_M = finish_softmax(max_M, sum_M, acc_MD)
        part_row_M = (part * num_kv_heads + kv_head).to(tl.int64) * ROWS + row_M
        tl.store(lse_ptr + part_row_M, lse_log2_M, mask=is_row_M)
        tl.store(part_ptr + part_row_M[:, None] * HEAD_DIM + d_D, part_MD, mask=mask_MD)


@triton.jit
def _store_ranges(
    ranges_ptr,
    num_units,
    items_U,
    ends_U,
    total,
    SPLIT_TILES: tl.constexpr,
    START_TILES: tl.constexpr,
):
    """Tell the merge each unit's first part and the end of its parts."""
    u_U = tl.arange(0, items_U.shape[0])
    first_U, end_U = parts_of(
        u_U, items_U, ends_U, total, tl.num_programs(0), SPLIT_TILES, START_TILES
    )
    tl.store(ranges_ptr + 2 * u_U, first_U, mask=u_U < num_units)
    tl.store(ranges_ptr + 2 * u_U + 1, end_U, mask=u_U < num_units)


@triton.jit
def _next_part(program, item, last_item, items_U, ends_U, SPLIT_TILES: tl.constexpr):
    """Return the unit of ``item``, the part's number, its tiles of that unit, and the next item."""
    u_U = tl.arange(0, items_U.shape[0])
    unit = tl.sum((ends_U <= item).to(tl.int32))
    unit_end = tl.sum(tl.where(u_U == unit, ends_U, 0))
    unit_begin = unit_end - tl.sum(tl.where(u_U == unit, items_U, 0))
    if SPLIT_TILES > 0:
        first_tile = (item - unit_begin) * SPLIT_TILES
        return unit, item, first_tile, first_tile + SPLIT_TILES, item + tl.num_programs(0)
    else:
        first_tile = item - unit_begin
        next_item = tl.minimum(last_item, unit_end)
        end_tile = next_item - unit_begin
        return unit, program + unit, first_tile, end_tile, next_item


@triton.jit
def _load_queries(
    q_ptr,
    first_query,
    count,
    kv_head,
    d_D,
    is_dim_D,
    stride_token,
    stride_head,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TWICE: tl.constexpr,
):
    """The rows of a unit's queries, zeros where there is none; all of them ``TWICE`` if so."""
    row_Q = tl.arange(0, 2 * BLOCK_M) % BLOCK_M if TWICE else tl.arange(0, BLOCK_M)
    offset_Q = (first_query + row_Q // GROUP).to(tl.int64) * stride_token
    offset_Q += (kv_head * GROUP + row_Q % GROUP) * stride_head
    mask_QD = (row_Q < count * GROUP)[:, None] & is_dim_D[None, :]
    return tl.load(q_ptr + offset_Q[:, None] + d_D, mask=mask_QD, other=0.0)

"""Few queries per request over the paged cache: split KV, then merge.

Memory-bound: each program reads an equal share of all tiles of one KV head once, for all query
heads of its group (packed as rows so that the products run on tensor cores). No atomics: results
depend on the lengths and the plan alone. Shapes: T query tokens, H query heads, K KV heads,
D head dim, U units (see split_kv), P parts, R packed rows of a unit, Q rows of q as the tile takes
them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.attention_reference import attention_decode_reference
from gpu_kernels.attention_variant import IN_KERNEL_LOG2_E, PLAIN, Variant, logits_args
from gpu_kernels.coded_tile import MAX_ROWS, MIN_DIM, attend_codes
from gpu_kernels.decode_merge import MERGE_DIMS, merge_kernel, merge_tile
from gpu_kernels.device import family
from gpu_kernels.kv_quant import bits_of
from gpu_kernels.page_table import PageTable
from gpu_kernels.paged_tile import (
    attend,
    check_attention_inputs,
    finish_softmax,
    head_dims,
    kv_args,
    padded_dim,
    request_extent,
)
from gpu_kernels.split_kv import QueryBlocks, items_of_units, num_parts, parts_of, share_of
from gpu_kernels.tuned import Config, choose

__all__ = ["DecodePlan", "attention_decode", "attention_decode_reference", "plan_decode"]

INTERPRETED_PROGRAMS = 8
# Of 0 to 6, 2 and 3 are fastest on an H200: 64 requests with Zipf lengths take 77 us instead of 84.
START_TILES = 2


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Grid and workspace for a number of units; serves any lengths, so a graph may hold it."""

    num_units: int
    num_programs: int  # of each KV head
    queries_per_unit: int
    split_tiles: int  # 0: balanced
    start_tiles: int  # what a unit costs before its first tile, in tiles
    config: Config  # of the launch
    part_PKRD: Tensor
    lse_log2_PKR: Tensor
    ranges_U2: Tensor  # each unit's first part and the end of its parts, int32


def plan_decode(
    num_units: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    queries_per_unit: int = 1,
    split_tokens: int | None = None,
    max_kv_len: int | None = None,
    num_programs: int | None = None,
) -> DecodePlan:
    """Make a plan for ``num_units`` requests, or blocks of up to ``queries_per_unit`` queries.

    Balanced by default: every program has the same number of tiles, whatever the lengths. With
    ``split_tokens`` each request is cut at its own multiples of that many tokens instead, so that a
    request's result does not depend on the others (batch-invariant); ``max_kv_len`` then bounds
    the workspace. ``dtype`` is the cache's. ``num_programs``: of each KV head, None: chosen.
    """
    rows = queries_per_unit * (num_heads // num_kv_heads)
    bits = bits_of(dtype)
    config = choose(
        "attention_decode",
        family(device),
        rows=rows,
        row_bytes=padded_dim(head_dim) * bits // 8,
        bits=bits,
    )
    block_n = config["BLOCK_N"]
    if num_programs is None:
        num_programs = max(_num_programs(device, config["per_sm"]) // num_kv_heads, 1)
    if split_tokens is not None:
        assert split_tokens % block_n == 0, f"split_tokens must be a multiple of {block_n}"
    parts = num_parts(num_units, num_programs, split_tokens, max_kv_len)
    return DecodePlan(
        num_units,
        num_programs,
        queries_per_unit,
        (split_tokens or 0) // block_n,
        START_TILES,
        {name: value for name, value in config.items() if name != "per_sm"},
        torch.empty((parts, num_kv_heads, rows, head_dim), dtype=torch.float32, device=device),
        torch.empty((parts, num_kv_heads, rows), dtype=torch.float32, device=device),
        torch.empty((num_units, 2), dtype=torch.int32, device=device),
    )


def attention_decode(
    q_THD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    plan: DecodePlan,
    *,
    sm_scale: float,
    variant: Variant = PLAIN,
    kv_scales: Tensor | None = None,
    blocks: QueryBlocks | None = None,
    positions_T: Tensor | None = None,
    out: Tensor | None = None,
    lse_log2: Tensor | None = None,
) -> Tensor:
    """Return attention of each request's newest token, whose own K and V are in the cache already.

    With ``blocks`` queries attend to the requests that these name, and see all of the cache, or up
    to their ``positions_T`` (int32) where given. ``lse_log2``, float32 [T, H], receives the base-2
    log-sum-exp, sinks included. Queries without any key get zeros, and -inf. ``kv_scales``: see
    :mod:`gpu_kernels.kv_quant`. One plan serves one launch at a time.
    """
    out = torch.empty_like(q_THD) if out is None else out
    check_attention_inputs(q_THD, kv_cache, kv_scales, pages, out)
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = kv_cache.shape[3]
    group = num_heads // num_kv_heads
    num_units = pages.num_requests if blocks is None else blocks.num_units
    assert plan.num_units == num_units and (blocks is not None or num_tokens == num_units)
    rows = plan.queries_per_unit * group
    assert plan.part_PKRD.shape[1:] == (num_kv_heads, rows, head_dim)
    assert plan.part_PKRD.device == q_THD.device
    assert plan.queries_per_unit == (1 if blocks is None else blocks.max_count)
    assert positions_T is None or (blocks is not None and positions_T.dtype == torch.int32)
    assert blocks is None or variant.window_left < 0, "a window needs one query per request"
    assert lse_log2 is None or (
        lse_log2.shape == q_THD.shape[:2]
        and lse_log2.dtype == torch.float32
        and lse_log2.is_contiguous()
    )
    if num_units == 0 or num_tokens == 0:
        return out
    in_codes = kv_scales is not None and q_THD.dtype != torch.float32 and rows <= MAX_ROWS
    tile = kv_args(kv_cache, kv_scales, pages)
    if in_codes:
        tile["BLOCK_D"] = max(tile["BLOCK_D"], 2 * MIN_DIM if tile["IS_INT4"] else MIN_DIM)
    shared = {
        "first_ptr": None if blocks is None else blocks.first_U,
        "count_ptr": None if blocks is None else blocks.count_U,
        "ranges_ptr": plan.ranges_U2,
        "part_ptr": plan.part_PKRD,
        "lse_ptr": plan.lse_log2_PKR,
        "GROUP": group,
        "ROWS": rows,
        "HEAD_DIM": head_dim,
        "HAS_BLOCKS": blocks is not None,
    }
    _decode_kernel[(plan.num_programs, num_kv_heads)](
        q_ptr=q_THD,
        request_ptr=None if blocks is None else blocks.request_U,
        positions_ptr=positions_T,
        num_units=num_units,
        window_left=variant.window_left,
        stride_q_token=q_THD.stride(0),
        stride_q_head=q_THD.stride(1),
        BLOCK_M=max(8 if in_codes else 16, triton.next_power_of_2(rows)),
        BLOCK_U=triton.next_power_of_2(num_units),
        SPLIT_TILES=plan.split_tiles,
        START_TILES=plan.start_tiles,
        HAS_POSITIONS=positions_T is not None,
        HAS_WINDOW=variant.window_left >= 0,
        IN_CODES=in_codes,
        IS_FP8=kv_cache.dtype == torch.float8_e4m3fn,
        **{**tile, **shared, **plan.config},
        **logits_args(variant, num_heads, sm_scale, q_THD.device),
    )
    merged = merge_tile(num_units, num_kv_heads, rows, plan.num_programs)
    row_blocks = num_kv_heads * triton.cdiv(rows, merged["BLOCK_R"])
    block_d = min(MERGE_DIMS, padded_dim(head_dim))
    merge_kernel[(num_units, row_blocks, triton.cdiv(head_dim, block_d))](
        out_ptr=out,
        out_lse_ptr=lse_log2,
        sinks_ptr=variant.sinks_H,
        stride_token=out.stride(0),
        stride_head=out.stride(1),
        HAS_LSE=lse_log2 is not None,
        HAS_SINKS=variant.sinks_H is not None,
        BLOCK_D=block_d,
        **shared,
        **merged,
    )
    return out


def _num_programs(device: torch.device | str, per_sm: int) -> int:
    if torch.device(device).type != "cuda":
        return INTERPRETED_PROGRAMS
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["num_units", "window_left"])
def _decode_kernel(
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
):
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
    u_U = tl.arange(0, BLOCK_U)
    if program + kv_head == 0:
        first_U, end_U = parts_of(
            u_U, items_U, ends_U, total, tl.num_programs(0), SPLIT_TILES, START_TILES
        )
        tl.store(ranges_ptr + 2 * u_U, first_U, mask=u_U < num_units)
        tl.store(ranges_ptr + 2 * u_U + 1, end_U, mask=u_U < num_units)
    d_D, is_dim_D = head_dims(HEAD_DIM, BLOCK_D, IS_INT4)
    row_M = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUP + row_M % GROUP
    slope_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope_M = tl.load(slopes_ptr + head_M) * IN_KERNEL_LOG2_E
    while item < last_item:
        unit = tl.sum((ends_U <= item).to(tl.int32))
        unit_end = tl.sum(tl.where(u_U == unit, ends_U, 0))
        unit_begin = unit_end - tl.sum(tl.where(u_U == unit, items_U, 0))
        if SPLIT_TILES > 0:
            first_tile = (item - unit_begin) * SPLIT_TILES
            end_tile = first_tile + SPLIT_TILES
            part = item
            item += tl.num_programs(0)
        else:
            first_tile = item - unit_begin
            end_tile = tl.minimum(last_item, unit_end) - unit_begin
            part = program + unit
            item = tl.minimum(last_item, unit_end)

        request, first_query, count = unit, unit, 1
        if HAS_BLOCKS:
            request = tl.load(request_ptr + unit)
            first_query = tl.load(first_ptr + unit)
            count = tl.load(count_ptr + unit)
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
        row_Q = tl.arange(0, 2 * BLOCK_M) % BLOCK_M if IN_CODES else row_M
        q_offset_Q = (first_query + row_Q // GROUP).to(tl.int64) * stride_q_token
        q_offset_Q += (kv_head * GROUP + row_Q % GROUP) * stride_q_head
        mask_QD = (row_Q < count * GROUP)[:, None] & is_dim_D[None, :]
        q_QD = tl.load(q_ptr + q_offset_Q[:, None] + d_D, mask=mask_QD, other=0.0)
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

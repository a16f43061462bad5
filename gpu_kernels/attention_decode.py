"""Few queries per request over the paged cache: split KV, then merge.

Two launches: ``decode_tile`` makes parts, as many for every program, and ``decode_merge`` weighs
them. No atomics: results depend on the lengths and the plan alone. Shapes: T query tokens, H query
heads, K KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpu_kernels.attention_reference import attention_decode_reference
from gpu_kernels.attention_variant import PLAIN, Variant, logits_args
from gpu_kernels.coded_tile import MAX_ROWS, MIN_DIM
from gpu_kernels.decode_merge import MERGE_DIMS, merge_kernel, merge_tile
from gpu_kernels.decode_plan import DecodePlan, plan_decode
from gpu_kernels.decode_tile import decode_kernel
from gpu_kernels.dependent_launch import dependent
from gpu_kernels.page_table import PageTable
from gpu_kernels.paged_tile import check_attention_inputs, kv_args, padded_dim
from gpu_kernels.split_kv import QueryBlocks
from gpu_kernels.whole_numbers import cdiv, next_power_of_2

__all__ = ["DecodePlan", "attention_decode", "attention_decode_reference", "plan_decode"]


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
    num_kv_heads = kv_cache.shape[3]
    _check_plan(plan, q_THD, num_kv_heads, pages, blocks)
    _check_options(q_THD, variant, blocks, positions_T, lse_log2)
    if plan.num_units == 0 or len(q_THD) == 0:
        return out
    units = _unit_args(plan, blocks)
    tile = _tile_args(q_THD, kv_cache, kv_scales, pages, rows=units["ROWS"])
    decode_kernel[(plan.num_programs, num_kv_heads)](
        q_ptr=q_THD,
        request_ptr=None if blocks is None else blocks.request_U,
        positions_ptr=positions_T,
        num_units=plan.num_units,
        window_left=variant.window_left,
        stride_q_token=q_THD.stride(0),
        stride_q_head=q_THD.stride(1),
        BLOCK_U=next_power_of_2(plan.num_units),
        SPLIT_TILES=plan.split_tiles,
        START_TILES=plan.start_tiles,
        HAS_POSITIONS=positions_T is not None,
        HAS_WINDOW=variant.window_left >= 0,
        **{**tile, **units, **plan.config},
        **dependent(q_THD.device),
        **logits_args(variant, q_THD.shape[1], sm_scale, q_THD.device),
    )
    _merge_parts(out, lse_log2, plan, units, variant.sinks_H)
    return out


def _check_plan(
    plan: DecodePlan,
    q_THD: Tensor,
    num_kv_heads: int,
    pages: PageTable,
    blocks: QueryBlocks | None,
) -> None:
    num_tokens, num_heads, head_dim = q_THD.shape
    assert plan.num_units == (pages.num_requests if blocks is None else blocks.num_units)
    assert blocks is not None or num_tokens == plan.num_units
    assert plan.queries_per_unit == (1 if blocks is None else blocks.max_count)
    rows = plan.queries_per_unit * (num_heads // num_kv_heads)
    assert plan.part_PKRD.shape[1:] == (num_kv_heads, rows, head_dim)
    assert plan.part_PKRD.device == q_THD.device


def _check_options(
    q_THD: Tensor,
    variant: Variant,
    blocks: QueryBlocks | None,
    positions_T: Tensor | None,
    lse_log2: Tensor | None,
) -> None:
    assert positions_T is None or (blocks is not None and positions_T.dtype == torch.int32)
    assert blocks is None or variant.window_left < 0, "a window needs one query per request"
    if lse_log2 is not None:
        assert lse_log2.shape == q_THD.shape[:2] and lse_log2.dtype == torch.float32
        assert lse_log2.is_contiguous()


def _unit_args(plan: DecodePlan, blocks: QueryBlocks | None) -> dict[str, Any]:
    """Arguments by name of both kernels that say what the units are and where their parts go."""
    rows, head_dim = plan.part_PKRD.shape[2:]
    return {
        "first_ptr": None if blocks is None else blocks.first_U,
        "count_ptr": None if blocks is None else blocks.count_U,
        "ranges_ptr": plan.ranges_U2,
        "part_ptr": plan.part_PKRD,
        "lse_ptr": plan.lse_log2_PKR,
        "GROUP": rows // plan.queries_per_unit,
        "ROWS": rows,
        "HEAD_DIM": head_dim,
        "HAS_BLOCKS": blocks is not None,
    }


def _tile_args(
    q_THD: Tensor, kv_cache: Tensor, kv_scales: Tensor | None, pages: PageTable, *, rows: int
) -> dict[str, Any]:
    """Where the keys and values lie, and how a tile of them meets ``rows`` packed rows."""
    tile = kv_args(kv_cache, kv_scales, pages)
    in_codes = kv_scales is not None and q_THD.dtype != torch.float32 and rows <= MAX_ROWS
    if in_codes:
        tile["BLOCK_D"] = max(tile["BLOCK_D"], 2 * MIN_DIM if tile["IS_INT4"] else MIN_DIM)
    return {
        **tile,
        "BLOCK_M": max(8 if in_codes else 16, next_power_of_2(rows)),
        "IN_CODES": in_codes,
        "IS_FP8": kv_cache.dtype == torch.float8_e4m3fn,
    }


def _merge_parts(
    out: Tensor,
    lse_log2: Tensor | None,
    plan: DecodePlan,
    units: dict[str, Any],
    sinks_H: Tensor | None,
) -> None:
    num_kv_heads, rows, head_dim = plan.part_PKRD.shape[1:]
    merged = merge_tile(plan.num_units, num_kv_heads, rows, plan.num_programs)
    row_blocks = num_kv_heads * cdiv(rows, merged["BLOCK_R"])
    block_d = min(MERGE_DIMS, padded_dim(head_dim))
    merge_kernel[(plan.num_units, row_blocks, cdiv(head_dim, block_d))](
        out_ptr=out,
        out_lse_ptr=lse_log2,
        sinks_ptr=sinks_H,
        stride_token=out.stride(0),
        stride_head=out.stride(1),
        HAS_LSE=lse_log2 is not None,
        HAS_SINKS=sinks_H is not None,
        BLOCK_D=block_d,
        **units,
        **merged,
        **dependent(out.device),
    )

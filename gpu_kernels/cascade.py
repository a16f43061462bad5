"""Requests that share a prefix: its keys are read once for all of them (cascade inference).

Level 0 attends from blocks of queries of a group to the group's shared pages, level 1 from each
query to its request's own pages; both states are then merged (FlashInfer, section 3.1 of
arXiv 2501.01005). Shapes: B requests (one query each, a group's neighbours), H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_kernels.attention_decode import DecodePlan, attention_decode, plan_decode
from gpu_kernels.attention_variant import Variant
from gpu_kernels.merge_states import merge_state_in_place
from gpu_kernels.page_table import PageTable
from gpu_kernels.split_kv import QueryBlocks

MAX_ROWS = 128  # query heads of a block: a full tile of the tensor cores


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """Grids and workspace of both levels; serves any lengths, for the same groups."""

    blocks: QueryBlocks
    prefix: DecodePlan
    suffix: DecodePlan
    out_BHD: Tensor  # of the prefix
    lse_log2_2BH: Tensor  # of both levels


def plan_cascade(
    group_sizes: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
) -> CascadePlan:
    """Make a plan for groups of that many requests each, which are neighbours in the batch.

    ``dtype`` is the queries' and the cache's.
    """
    queries = max(MAX_ROWS * num_kv_heads // num_heads, 1)
    blocks = QueryBlocks.of_groups(list(group_sizes), queries, device)
    num_requests = sum(group_sizes)
    shape = (num_heads, num_kv_heads, head_dim)
    return CascadePlan(
        blocks,
        plan_decode(blocks.num_units, *shape, device=device, dtype=dtype, queries_per_unit=queries),
        plan_decode(num_requests, *shape, device=device, dtype=dtype),
        torch.empty((num_requests, num_heads, head_dim), dtype=dtype, device=device),
        torch.empty((2, num_requests, num_heads), dtype=torch.float32, device=device),
    )


def attention_cascade(
    q_BHD: Tensor,
    kv_cache: Tensor,
    prefix_pages: PageTable,
    suffix_pages: PageTable,
    plan: CascadePlan,
    *,
    sm_scale: float,
    soft_cap: float = 0.0,
    kv_scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return attention of each request's newest token over its group's prefix and its own suffix.

    ``prefix_pages`` has a row per group, ``suffix_pages`` one per request; a prefix ends at a full
    page. A sliding window or ALiBi would need positions across both levels: not here.
    """
    variant = Variant(logits_soft_cap=soft_cap)
    shared: dict[str, Any] = {"sm_scale": sm_scale, "variant": variant, "kv_scales": kv_scales}
    lse_prefix_BH, lse_BH = plan.lse_log2_2BH
    attention_decode(
        q_BHD,
        kv_cache,
        prefix_pages,
        plan.prefix,
        blocks=plan.blocks,
        out=plan.out_BHD,
        lse_log2=lse_prefix_BH,
        **shared,
    )
    out = torch.empty_like(q_BHD) if out is None else out
    attention_decode(q_BHD, kv_cache, suffix_pages, plan.suffix, out=out, lse_log2=lse_BH, **shared)
    merge_state_in_place(out, lse_BH, plan.out_BHD, lse_prefix_BH)
    return out

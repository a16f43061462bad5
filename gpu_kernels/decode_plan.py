"""What a launch of decode attention needs besides its tensors: a grid, and room for the parts.

Shapes: U units (see split_kv), P parts, K KV heads, R packed rows of a unit, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_kernels.device import family
from gpu_kernels.kv_quant import bits_of
from gpu_kernels.paged_tile import padded_dim
from gpu_kernels.split_kv import num_parts
from gpu_kernels.tuned import Config, choose

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


def _num_programs(device: torch.device | str, per_sm: int) -> int:
    if torch.device(device).type != "cuda":
        return INTERPRETED_PROGRAMS
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count

"""How the caches of a batch are divided among programs: computed on the device from the lengths.

Nothing here depends on a length on the host, so a captured graph serves any lengths. The unit is a
block of queries that share one request's cache (in plain decoding a request and its one query).
Shapes: U units.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.paged_tile import request_extent


@dataclass(frozen=True, slots=True)
class QueryBlocks:
    """Units of several neighbouring queries: unit u's are ``first_U[u]`` and on, ``count_U[u]``.

    It attends to the cache of row ``request_U[u]`` of the page table. All int32 on the device;
    units may share a request (a prefix that many continue), and no count is above ``max_count``.
    """

    first_U: Tensor
    count_U: Tensor
    request_U: Tensor
    max_count: int

    def __post_init__(self) -> None:
        tensors = (self.first_U, self.count_U, self.request_U)
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors)
        assert all(t.shape == self.first_U.shape and t.ndim == 1 for t in tensors)

    @classmethod
    def of_groups(
        cls, group_sizes: list[int], max_count: int, device: torch.device | str = "cpu"
    ) -> QueryBlocks:
        """Units for groups of neighbouring queries, group g attending to row g."""
        first, count, request, query = [], [], [], 0
        for group, size in enumerate(group_sizes):
            for begin in range(0, size, max_count):
                first.append(query + begin)
                count.append(min(max_count, size - begin))
                request.append(group)
            query += size
        packed = torch.tensor([first, count, request], dtype=torch.int32).to(device)
        return cls(packed[0], packed[1], packed[2], max_count)

    @property
    def num_units(self) -> int:
        return self.first_U.shape[0]


def num_parts(
    num_units: int, num_programs: int, split_tokens: int | None, max_kv_len: int | None
) -> int:
    """Partial results that there may be at most.

    Balanced: program p's part of unit u is number p + u, since both only ever go up.
    """
    if split_tokens is None:
        return num_programs + num_units
    assert max_kv_len is not None, "a fixed split needs max_kv_len"
    return num_units * max(-(-max_kv_len // split_tokens), 1)


@triton.jit
def items_of_units(
    indptr_ptr,
    last_page_len_ptr,
    request_ptr,
    num_units,
    window_left,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
):
    """Return (items of each unit, their running sum, total).

    An item is a tile of BLOCK_N tokens, or SPLIT_TILES of them where that is not 0. With
    ``IS_ALIGNED`` a window's first tile begins at a multiple of BLOCK_N.
    """
    u_U = tl.arange(0, BLOCK_U)
    is_unit_U = u_U < num_units
    request_U = tl.where(is_unit_U, u_U, 0)
    if HAS_BLOCKS:
        request_U = tl.load(request_ptr + u_U, mask=is_unit_U, other=0)
    _, kv_len_U = request_extent(indptr_ptr, last_page_len_ptr, request_U, PAGE_SIZE)
    if HAS_WINDOW:
        first_U = tl.maximum(kv_len_U - 1 - window_left, 0)
        kv_len_U -= first_U // BLOCK_N * BLOCK_N if IS_ALIGNED else first_U
    ITEM: tl.constexpr = BLOCK_N * max(SPLIT_TILES, 1)
    items_U = tl.where(is_unit_U, (kv_len_U + ITEM - 1) // ITEM, 0)
    return items_U, tl.cumsum(items_U, 0), tl.sum(items_U, 0)


@triton.jit
def queries_of_unit(first_ptr, count_ptr, unit, HAS_BLOCKS: tl.constexpr):
    """Return a unit's first query and how many it has."""
    if HAS_BLOCKS:
        return tl.load(first_ptr + unit), tl.load(count_ptr + unit)
    else:
        return unit, 1


@triton.jit
def share_of(
    program, num_programs, items_U, total, SPLIT_TILES: tl.constexpr, START_TILES: tl.constexpr
):
    """Items ``[begin, end)`` of a program; with a fixed split it takes every num_programs-th."""
    if SPLIT_TILES > 0:
        return program, total
    active = _num_active(total, num_programs)
    cost_U = _costs(items_U, START_TILES)
    cost = tl.sum(cost_U, 0)
    begin = _item_at(program * cost // active, items_U, cost_U, START_TILES)
    end = _item_at((program + 1) * cost // active, items_U, cost_U, START_TILES)
    return begin, tl.where(program < active, end, 0)


@triton.jit
def parts_of(
    unit_U,
    items_U,
    ends_U,
    total,
    num_programs,
    SPLIT_TILES: tl.constexpr,
    START_TILES: tl.constexpr,
):
    """Numbers ``[begin, end)`` of every unit's parts: the inverse of :func:`share_of`.

    What costs c before it belongs to the last program p with p * cost // active <= c.
    """
    if SPLIT_TILES > 0:
        return ends_U - items_U, ends_U
    active = _num_active(total, num_programs)
    cost_U = _costs(items_U, START_TILES)
    cost = tl.maximum(tl.sum(cost_U, 0), 1)
    after_U = tl.cumsum(cost_U, 0)
    before_U = after_U - items_U  # of the first item
    first_U = ((before_U + 1) * active - 1) // cost + unit_U
    end_U = (after_U * active - 1) // cost + unit_U + 1
    return first_U, tl.where(items_U > 0, end_U, first_U)


@triton.jit
def _costs(items_U, START_TILES: tl.constexpr):
    """Of each unit, in tiles: to begin one, a pipeline fills and its part is written."""
    return tl.where(items_U > 0, items_U + START_TILES, 0)


@triton.jit
def _item_at(cost, items_U, cost_U, START_TILES: tl.constexpr):
    """The number of items that begin before so much cost; no unit is cut before its first one."""
    before_U = tl.cumsum(cost_U, 0) - cost_U + START_TILES
    return tl.sum(tl.minimum(tl.maximum(cost - before_U, 0), items_U), 0)


@triton.jit
def _num_active(total, num_programs):
    """Programs that share ``total`` tiles: none gets less than two where that can be."""
    # writing and merging a part costs more than one tile saves
    return tl.maximum(tl.minimum(total // 2, num_programs), 1)

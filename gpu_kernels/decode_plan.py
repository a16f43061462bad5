"""How a decode step's cache is cut into equal pieces: a pure function of the lengths.

Made once per step on the host and used by every layer. Shapes: B requests, W work items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_CHUNK_TOKENS = 128  # below this, writing and merging a part costs more than it saves


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Work item w covers tokens ``[t * chunk_size, (t + 1) * chunk_size)`` of one request.

    The request is ``request_indices[w]`` and t is ``kv_tile_indices[w]``; request i's items are
    ``o_indptr[i]:o_indptr[i + 1]``, at least one (an empty request's item writes the zeros).
    With a sliding window tokens count from the first one inside the window.
    """

    request_indices: Tensor
    kv_tile_indices: Tensor
    o_indptr: Tensor
    chunk_size: int

    @property
    def num_requests(self) -> int:
        return self.o_indptr.shape[0] - 1

    @property
    def num_work(self) -> int:
        return self.request_indices.shape[0]

    @property
    def is_split(self) -> bool:
        return self.num_work > self.num_requests

    def to(self, device: torch.device | str) -> DecodePlan:
        """Send the plan to ``device`` in one copy."""
        parts = (self.request_indices, self.kv_tile_indices, self.o_indptr)
        sent = torch.cat(parts).to(device, non_blocking=True)
        request_indices, kv_tile_indices, o_indptr = sent.split([len(p) for p in parts])
        return DecodePlan(request_indices, kv_tile_indices, o_indptr, self.chunk_size)


def plan_decode(
    kv_lens: Sequence[int], num_kv_heads: int, *, page_size: int, max_programs: int
) -> DecodePlan:
    """Split the requests so that about ``max_programs`` programs are busy, and no finer.

    ``kv_lens`` are the tokens each request attends to: its cached length, or
    ``min(length, window_left + 1)`` if every layer has a sliding window. The plan lies on the
    host; ``to`` moves it.
    """
    assert page_size > 0 and num_kv_heads > 0 and max_programs > 0
    pages_B = -(-np.asarray(kv_lens, dtype=np.int64).reshape(-1) // page_size)
    slots = max(max_programs // num_kv_heads, 1)
    chunk = pages_per_chunk(pages_B, slots, max(MIN_CHUNK_TOKENS // page_size, 1))
    tiles_B = np.maximum(-(-pages_B // chunk), 1)
    o_indptr = np.concatenate([[0], np.cumsum(tiles_B)])
    request_indices = np.repeat(np.arange(len(tiles_B)), tiles_B)
    kv_tile_indices = np.arange(o_indptr[-1]) - o_indptr[request_indices]
    return DecodePlan(
        _int32(request_indices), _int32(kv_tile_indices), _int32(o_indptr), chunk * page_size
    )


def pages_per_chunk(pages_B: NDArray[np.int64], slots: int, min_pages: int) -> int:
    """Return the pages of a work item for ``slots`` items at a time.

    The smallest chunk that needs one wave only, unless skewed lengths make it longer than two
    chunks of the mean: then the mean, which bounds the step by two of them in any order.
    """
    longest = int(pages_B.max(initial=1))
    mean = max(min_pages, -(-int(pages_B.sum()) // slots))
    low, high = min_pages, max(longest, min_pages)
    while low < high:
        middle = (low + high) // 2
        if int(np.maximum(-(-pages_B // middle), 1).sum()) <= slots:
            high = middle
        else:
            low = middle + 1
    return low if low <= 2 * mean else mean


def _int32(values: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))

"""Where each request's keys and values lie in the paged cache.

The conventions are FlashInfer's: int32 CSR arrays, NHD pages in one 5-D cache
``[pages, 2, page_size, kv_heads, head_dim]`` (index 0 of the second axis is K, 1 is V).

Shapes: B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PageTable:
    """Pages of a ragged batch: request i owns ``indices[indptr_B1[i] : indptr_B1[i + 1]]``.

    All three tensors are int32 on one device. Every page but a request's last is full; the last
    holds ``last_page_len_B[i]`` tokens, in 1..page_size. An empty request has no pages and 0 there.
    """

    indptr_B1: Tensor
    indices: Tensor
    last_page_len_B: Tensor
    page_size: int = 16

    def __post_init__(self) -> None:
        tensors = (self.indptr_B1, self.indices, self.last_page_len_B)
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in tensors)
        assert self.indptr_B1.shape == (self.num_requests + 1,) and self.indices.ndim == 1
        assert self.page_size > 0 and self.page_size & (self.page_size - 1) == 0

    @classmethod
    def from_lists(
        cls,
        pages: Sequence[Sequence[int]],
        kv_lens: Sequence[int],
        *,
        page_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> PageTable:
        """Build the table on the host and send it to ``device`` in one copy.

        ``pages[i]`` lists at least the pages that ``kv_lens[i]`` tokens need; spare ones at its
        end (reserved for growth) are left out.
        """
        kv_len_B = np.asarray(kv_lens, dtype=np.int64).reshape(-1)
        num_pages_B = -(-kv_len_B // page_size)
        assert len(pages) == len(kv_len_B), "one page list and one length per request"
        used = [row[:count] for row, count in zip(pages, num_pages_B.tolist(), strict=True)]
        assert [len(row) for row in used] == num_pages_B.tolist(), "a request lacks pages"
        indices = np.fromiter((page for row in used for page in row), dtype=np.int32)
        last_page_len_B = kv_len_B - np.maximum(num_pages_B - 1, 0) * page_size
        packed = np.concatenate([[0], np.cumsum(num_pages_B), last_page_len_B, indices])
        sent = torch.from_numpy(packed.astype(np.int32)).to(device, non_blocking=True)
        sizes = [len(kv_len_B) + 1, len(kv_len_B), len(indices)]
        indptr_B1, last_len_B, page_ids = sent.split(sizes)
        return cls(indptr_B1, page_ids, last_len_B, page_size)

    @property
    def num_requests(self) -> int:
        return self.last_page_len_B.shape[0]

    @property
    def kv_len_B(self) -> Tensor:
        """Tokens in the cache per request, int32 on the table's device."""
        full_pages_B = (self.indptr_B1.diff() - 1).clamp(min=0)
        return full_pages_B * self.page_size + self.last_page_len_B


def gather_kv(kv_cache: Tensor, pages: PageTable, request: int) -> tuple[Tensor, Tensor]:
    """Return one request's keys and values, ``[kv_len, kv_heads, head_dim]`` each (a copy)."""
    begin, end = pages.indptr_B1[request : request + 2].tolist()
    kv_len = int(pages.kv_len_B[request])
    rows = kv_cache[pages.indices[begin:end].long()]  # [pages, 2, page_size, heads, head_dim]
    keys, values = rows.unbind(1)
    return keys.flatten(0, 1)[:kv_len], values.flatten(0, 1)[:kv_len]

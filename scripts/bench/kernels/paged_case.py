"""A random paged cache with shuffled page ids, as a long-running server has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpu_kernels.page_table import PageTable

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 4, 128, 16
SM_SCALE = HEAD_DIM**-0.5


def make_cache(kv_lens: Sequence[int]) -> tuple[Tensor, PageTable]:
    """Return a bf16 cache and the table of requests with these lengths."""
    counts = [-(-n // PAGE_SIZE) for n in kv_lens]
    order = torch.randperm(sum(counts)).tolist()
    page_lists = [[order.pop() for _ in range(count)] for count in counts]
    shape = (sum(counts), 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    kv_cache = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    return kv_cache, PageTable.from_lists(page_lists, kv_lens, page_size=PAGE_SIZE, device="cuda")


def make_queries(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

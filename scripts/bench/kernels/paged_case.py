"""A random paged cache with shuffled page ids, as a long-running server has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_kernels.attention_decode import attention_decode, plan_decode
from gpu_kernels.kv_quant import INT4, new_kv_scales, stored_size
from gpu_kernels.page_table import PageTable

NUM_HEADS, HEAD_DIM, PAGE_SIZE = 32, 128, 16
SM_SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True, slots=True)
class DecodeCase:
    """One query per request."""

    q_BHD: Tensor
    kv_cache: Tensor
    kv_scales: Tensor | None
    pages: PageTable
    num_bytes: int  # of K and V, with scales, and of q and the output

    def runner(self, num_programs: int | None = None) -> Callable[[], Tensor]:
        """What runs the kernel with a plan made before."""
        plan = plan_decode(
            len(self.q_BHD),
            NUM_HEADS,
            self.kv_cache.shape[3],
            HEAD_DIM,
            device="cuda",
            dtype=self.kv_cache.dtype,
            num_programs=num_programs,
        )
        return lambda: attention_decode(
            self.q_BHD,
            self.kv_cache,
            self.pages,
            plan,
            sm_scale=SM_SCALE,
            kv_scales=self.kv_scales,
        )


def make_pages(kv_lens: Sequence[int]) -> PageTable:
    """The table of requests with these lengths, all pages in a random order."""
    counts = [-(-n // PAGE_SIZE) for n in kv_lens]
    order = torch.randperm(sum(counts)).tolist()
    page_lists = [[order.pop() for _ in range(count)] for count in counts]
    return PageTable.from_lists(page_lists, kv_lens, page_size=PAGE_SIZE, device="cuda")


def make_cache(
    kv_lens: Sequence[int], num_kv_heads: int = 4, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, PageTable]:
    """A cache of normal numbers (or codes) and its table."""
    pages = make_pages(kv_lens)
    shape = (len(pages.indices), 2, PAGE_SIZE, num_kv_heads, stored_size(HEAD_DIM, dtype))
    if dtype == torch.bfloat16:
        return torch.randn(shape, dtype=dtype, device="cuda"), pages
    if dtype == INT4:
        return torch.randint(256, shape, dtype=INT4, device="cuda"), pages
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")
    return codes if dtype == torch.int8 else codes.bfloat16().to(dtype), pages


def make_queries(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")


def decode_case(
    kv_lens: Sequence[int], num_kv_heads: int, dtype: torch.dtype = torch.bfloat16
) -> DecodeCase:
    kv_cache, pages = make_cache(kv_lens, num_kv_heads, dtype)
    kv_scales, scale_bytes = None, 0
    if dtype != torch.bfloat16:
        kv_scales, scale_bytes = new_kv_scales(kv_cache).fill_(0.01), 4
    row_bytes = kv_cache.shape[4] * kv_cache.element_size() + scale_bytes
    q_BHD = make_queries(len(kv_lens))
    num_bytes = 2 * sum(kv_lens) * num_kv_heads * row_bytes + 2 * 2 * q_BHD.numel()
    return DecodeCase(q_BHD, kv_cache, kv_scales, pages, num_bytes)


def zipf_lengths(num_requests: int, total: int) -> list[int]:
    """Lengths proportional to 1 / rank that sum to about ``total``."""
    weights = [1 / (rank + 1) for rank in range(num_requests)]
    return [max(1, int(total * w / sum(weights))) for w in weights]

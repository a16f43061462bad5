"""Ragged batches over a shuffled, poisoned paged cache, and one way to compare results.

Shapes: B requests, T query tokens, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_kernels.page_table import PageTable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Queries over a cache whose slots beyond every request's length hold NaN."""

    q_THD: Tensor
    kv_cache: Tensor
    pages: PageTable
    qo_indptr_B1: Tensor
    kv_lens: list[int]
    dense_kv: list[tuple[Tensor, Tensor]]  # per request, K and V as [kv_len, K, D]

    @property
    def sm_scale(self) -> float:
        return self.q_THD.shape[-1] ** -0.5


def make_batch(
    kv_lens: Sequence[int],
    qo_lens: Sequence[int] | None = None,
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedBatch:
    """Build a batch; without ``qo_lens`` every request has one query (decode)."""
    rng = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    qo_lens = [1] * len(kv_lens) if qo_lens is None else qo_lens
    num_pages = [-(-n // page_size) for n in kv_lens]
    shuffled = torch.randperm(sum(num_pages) + 3, generator=rng).tolist()
    page_lists = [[shuffled.pop() for _ in range(count)] for count in num_pages]
    cache_shape = (sum(num_pages) + 3, 2, page_size, num_kv_heads, head_dim)
    kv_cache = torch.full(cache_shape, float("nan"), dtype=dtype)
    dense_kv = []
    for page_ids, kv_len in zip(page_lists, kv_lens, strict=True):
        dense = torch.randn(kv_len, 2, num_kv_heads, head_dim, generator=rng).to(dtype)
        for token in range(kv_len):
            kv_cache[page_ids[token // page_size], :, token % page_size] = dense[token]
        dense_kv.append((dense[:, 0].to(DEVICE), dense[:, 1].to(DEVICE)))
    q_THD = torch.randn(sum(qo_lens), num_heads, head_dim, generator=rng).to(dtype)
    return PagedBatch(
        q_THD.to(DEVICE),
        kv_cache.to(DEVICE),
        PageTable.from_lists(page_lists, kv_lens, page_size=page_size, device=DEVICE),
        torch.tensor([0, *qo_lens]).cumsum(0).to(DEVICE, torch.int32),
        list(kv_lens),
        dense_kv,
    )


def dense_oracle(
    batch: PagedBatch, *, window_left: int = -1, sm_scale: float | None = None
) -> Tensor:
    """Attention from the dense keys, query by query, in float64: the definition, spelled out."""
    scale = batch.sm_scale if sm_scale is None else sm_scale
    out_THD = torch.zeros_like(batch.q_THD, dtype=torch.float64)
    group = batch.q_THD.shape[1] // batch.kv_cache.shape[3]
    bounds = batch.qo_indptr_B1.tolist()
    for request, (keys, values) in enumerate(batch.dense_kv):
        begin, end = bounds[request : request + 2]
        for token in range(begin, end):
            position = len(keys) - (end - token)
            oldest = 0 if window_left < 0 else max(position - window_left, 0)
            if position < 0:
                continue
            k_SHD = keys[oldest : position + 1].double().repeat_interleave(group, 1)
            v_SHD = values[oldest : position + 1].double().repeat_interleave(group, 1)
            logits_SH = (k_SHD * batch.q_THD[token].double()).sum(-1) * scale
            out_THD[token] = (logits_SH.softmax(0)[..., None] * v_SHD).sum(0)
    return out_THD


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN anywhere counts as infinite."""
    return float((actual.double() - expected.double()).abs().nan_to_num(nan=torch.inf).max())


def frobenius_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error, ||actual - expected|| / ||expected||."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm())

"""Ragged batches over a shuffled, poisoned paged cache, and one way to compare results.

Shapes: B requests, T query tokens, H query heads, K KV heads, D head dim, S keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from gpu_kernels.attention_variant import PLAIN, Variant
from gpu_kernels.kv_quant import dequantise_kv, quantise_kv
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
    kv_scales: Tensor | None = None

    @property
    def sm_scale(self) -> float:
        return float(self.q_THD.shape[-1] ** -0.5)

    def with_queries(self, q_THD: Tensor) -> Self:
        return replace(self, q_THD=q_THD)

    def quantised(self, dtype: torch.dtype) -> Self:
        """The same with keys and values in codes, and the dense ones as these say."""
        codes, scale = quantise_kv(self.kv_cache, dtype)  # [pages, 2, page_size, K(, D)]
        scales = scale.transpose(2, 3).contiguous()
        dense = [
            tuple(dequantise_kv(*quantise_kv(x, dtype)) for x in pair) for pair in self.dense_kv
        ]
        return replace(self, kv_cache=codes, kv_scales=scales, dense_kv=dense)


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


def some_sinks(num_heads: int) -> Tensor:
    return torch.linspace(-2.0, 3.0, num_heads, device=DEVICE)


def some_slopes(num_heads: int) -> Tensor:
    """As published: 2 ** (-8 h / H)."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=DEVICE) / num_heads)


DECODE_VARIANTS = {
    "cap": Variant(logits_soft_cap=1.5),
    "sinks": Variant(sinks_H=some_sinks(4)),
    "alibi": Variant(alibi_slopes_H=some_slopes(4)),
    "window and sinks": Variant(window_left=40, sinks_H=some_sinks(4)),
    "window and cap": Variant(window_left=3, logits_soft_cap=30.0),
}


def dense_oracle(
    batch: PagedBatch, variant: Variant = PLAIN, *, sm_scale: float | None = None
) -> Tensor:
    return dense_oracle_with_lse(batch, variant, sm_scale=sm_scale)[0]


def dense_oracle_with_lse(
    batch: PagedBatch,
    variant: Variant = PLAIN,
    *,
    sm_scale: float | None = None,
    is_causal: bool = True,
    positions: Sequence[int] | None = None,
    keep: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention from the dense keys, query by query, in float64: the definition, spelled out.

    ``positions`` of the query tokens; ``keep[token]``: which keys that query may see.
    Returns (out ``[T, H, D]``, base-2 log-sum-exp ``[T, H]``).
    """
    scale = batch.sm_scale if sm_scale is None else sm_scale
    num_tokens, num_heads, _ = batch.q_THD.shape
    out_THD = torch.zeros_like(batch.q_THD, dtype=torch.float64)
    lse_TH = torch.full((num_tokens, num_heads), -math.inf, dtype=torch.float64, device=DEVICE)
    bounds = batch.qo_indptr_B1.tolist()
    for request, (keys, values) in enumerate(batch.dense_kv):
        begin, end = bounds[request : request + 2]
        for token in range(begin, end):
            position = len(keys) - (end - token) if is_causal else len(keys) - 1
            if positions is not None:
                position = positions[token]
            seen_S = torch.arange(len(keys), device=DEVICE) <= position
            if variant.window_left >= 0:
                seen_S &= torch.arange(len(keys), device=DEVICE) >= position - variant.window_left
            if keep is not None:
                seen_S &= keep[token]
            logits_SH = _logits(batch, keys, token, position, scale, variant)
            logits_SH[~seen_S] = -math.inf
            if variant.sinks_H is not None:
                logits_SH = torch.cat([logits_SH, variant.sinks_H.double()[None]])
            weights_SH = logits_SH.softmax(0).nan_to_num()[: len(keys)]
            group = num_heads // values.shape[1]
            v_SHD = values.double().repeat_interleave(group, 1)
            out_THD[token] = (weights_SH[..., None] * v_SHD).sum(0)
            lse_TH[token] = logits_SH.logsumexp(0) / math.log(2)
    return out_THD, lse_TH


def _logits(
    batch: PagedBatch, keys: Tensor, token: int, position: int, scale: float, variant: Variant
) -> Tensor:
    k_SHD = keys.double().repeat_interleave(batch.q_THD.shape[1] // keys.shape[1], 1)
    logits_SH = (k_SHD * batch.q_THD[token].double()).sum(-1) * scale
    if variant.logits_soft_cap:
        logits_SH = variant.logits_soft_cap * (logits_SH / variant.logits_soft_cap).tanh()
    if variant.alibi_slopes_H is not None:
        distance_S1 = torch.arange(len(keys), device=DEVICE)[:, None] - position
        logits_SH = logits_SH + variant.alibi_slopes_H.double() * distance_S1
    return logits_SH


def max_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN anywhere counts as infinite, equal infinities as none."""
    difference = (actual.double() - expected.double()).abs()
    difference = difference.masked_fill(actual.double() == expected.double(), 0.0)
    return float(difference.nan_to_num(nan=torch.inf).max())


def frobenius_error(actual: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error, ||actual - expected|| / ||expected||; 0 of two zeros."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if difference != 0 else 0.0

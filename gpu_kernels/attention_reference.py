"""Attention over the paged cache in plain torch and float32: what both kernels must agree with.

Shapes: T query tokens, B requests, Q queries and S keys of one request, H query heads, K KV heads,
D head dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from gpu_kernels.attention_variant import LOG2_E, PLAIN, Variant
from gpu_kernels.kv_quant import dequantise_kv
from gpu_kernels.page_table import PageTable, gather_kv


def attention_prefill_reference(
    q_THD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    qo_indptr_B1: Tensor,
    *,
    sm_scale: float,
    is_causal: bool = True,
    variant: Variant = PLAIN,
    kv_scales: Tensor | None = None,
    positions_T: Tensor | None = None,
    custom_mask: Tensor | None = None,
    mask_indptr_B1: Tensor | None = None,
    lse_log2: Tensor | None = None,
) -> Tensor:
    """As :func:`gpu_kernels.attention_prefill.attention_prefill`, returned in float32."""
    if kv_scales is not None:  # [pages, 2, heads, page_size] to that of the cache
        kv_cache = dequantise_kv(kv_cache, kv_scales.transpose(2, 3))
    out_THD = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    for request, (begin, end) in enumerate(pairwise(qo_indptr_B1.tolist())):
        k_SKD, v_SKD = (x.float() for x in gather_kv(kv_cache, pages, request))
        num_queries, kv_len = end - begin, len(k_SKD)
        key_S = torch.arange(kv_len, device=q_THD.device)
        if positions_T is not None:
            position_Q1 = positions_T[begin:end, None].long()
        elif is_causal:
            position_Q1 = torch.arange(kv_len - num_queries, kv_len, device=q_THD.device)[:, None]
        else:
            position_Q1 = torch.full((num_queries, 1), kv_len - 1, device=q_THD.device)
        keep_QS = key_S <= position_Q1
        if variant.window_left >= 0:
            keep_QS &= key_S >= position_Q1 - variant.window_left
        if custom_mask is not None and mask_indptr_B1 is not None:
            first = int(mask_indptr_B1[request])
            keep_QS &= custom_mask[first : first + num_queries * kv_len].view(num_queries, kv_len)
        logits_HQS = _logits(
            q_THD[begin:end].float(), k_SKD, key_S - position_Q1, sm_scale, variant
        )
        logits_HQS = logits_HQS.masked_fill(~keep_QS, float("-inf"))
        out_THD[begin:end] = _weighted(logits_HQS, v_SKD, variant.sinks_H)
        if lse_log2 is not None:
            lse_HQ = _with_sink(logits_HQS, variant.sinks_H).logsumexp(-1)
            lse_log2[begin:end] = lse_HQ.T * LOG2_E
    return out_THD


def attention_decode_reference(
    q_BHD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    *,
    sm_scale: float,
    variant: Variant = PLAIN,
    kv_scales: Tensor | None = None,
    lse_log2: Tensor | None = None,
) -> Tensor:
    """A prefill of one token per request."""
    return attention_prefill_reference(
        q_BHD,
        kv_cache,
        pages,
        torch.arange(q_BHD.shape[0] + 1, dtype=torch.int32),
        sm_scale=sm_scale,
        variant=variant,
        kv_scales=kv_scales,
        lse_log2=lse_log2,
    )


def _logits(
    q_QHD: Tensor, k_SKD: Tensor, distance_QS: Tensor, sm_scale: float, variant: Variant
) -> Tensor:
    group = q_QHD.shape[1] // k_SKD.shape[1]
    logits_HQS = torch.einsum("qhd,shd->hqs", q_QHD, k_SKD.repeat_interleave(group, 1)) * sm_scale
    if variant.logits_soft_cap:
        logits_HQS = variant.logits_soft_cap * torch.tanh(logits_HQS / variant.logits_soft_cap)
    if variant.alibi_slopes_H is not None:
        logits_HQS = logits_HQS + variant.alibi_slopes_H[:, None, None] * distance_QS
    return logits_HQS


def _with_sink(logits_HQS: Tensor, sinks_H: Tensor | None) -> Tensor:
    if sinks_H is None:
        return logits_HQS
    sink_HQ1 = sinks_H[:, None, None].expand(*logits_HQS.shape[:2], 1)
    return torch.cat([logits_HQS, sink_HQ1], -1)


def _weighted(logits_HQS: Tensor, v_SKD: Tensor, sinks_H: Tensor | None) -> Tensor:
    group = len(logits_HQS) // v_SKD.shape[1]
    weights_HQS = _with_sink(logits_HQS, sinks_H).softmax(-1).nan_to_num()
    v_SHD = v_SKD.repeat_interleave(group, 1)
    return torch.einsum("hqs,shd->qhd", weights_HQS[..., : len(v_SKD)], v_SHD)

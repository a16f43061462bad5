"""What :mod:`gpu_kernels.kv_append` computes, in plain torch.

Shapes: T tokens, H query heads, K KV heads, D head dim, S positions of the table, R = D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.kv_quant import quantise_kv


def rope_and_append_reference(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    kv_cache: Tensor,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    eps: float = 1e-6,
    *,
    kv_scales: Tensor | None = None,
) -> Tensor:
    """Return the rotated q in float32, and write K and V into the cache."""
    cos_T1R, sin_T1R = (table[positions_T.long()].unsqueeze(1) for table in (cos_SR, sin_SR))
    k_rotated_TKD = _rotate_reference(k_TKD, k_norm_D, cos_T1R, sin_T1R, eps)
    is_kept_T = slots_T >= 0
    kept_T = slots_T[is_kept_T].long()
    page_T, offset_T = kept_T // kv_cache.shape[2], kept_T % kv_cache.shape[2]
    for kind, x_TKD in enumerate((k_rotated_TKD[is_kept_T], v_TKD[is_kept_T])):
        if kv_scales is not None:
            x_TKD, scale_TK = quantise_kv(x_TKD, kv_cache.dtype)
            kv_scales[page_T, kind, :, offset_T] = scale_TK
        kv_cache[page_T, kind, offset_T] = x_TKD.to(kv_cache.dtype)
    return _rotate_reference(q_THD, q_norm_D, cos_T1R, sin_T1R, eps)


def _rotate_reference(
    x_THD: Tensor, norm_D: Tensor | None, cos_T1R: Tensor, sin_T1R: Tensor, eps: float
) -> Tensor:
    x_THD = x_THD.float()
    if norm_D is not None:
        x_THD = x_THD * torch.rsqrt(x_THD.square().mean(-1, keepdim=True) + eps) * norm_D.float()
    low, high = x_THD.chunk(2, dim=-1)
    return torch.cat([low * cos_T1R - high * sin_T1R, high * cos_T1R + low * sin_T1R], dim=-1)

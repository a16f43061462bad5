"""Keys and values in eight bits: a code per element, a float32 scale per token and head.

x = code * scale. Codes are int8 in -127..127 or fp8 e4m3; scales lie apart from the pages, as
``[pages, 2, kv_heads, page_size]``: a head's scales of one page are neighbours, one or two reads of
32 bytes, where ``[page_size, kv_heads]`` would fetch four times as much.
Shapes: T tokens, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def new_kv_scales(kv_cache: Tensor) -> Tensor:
    """Return room for the scales of a cache ``[pages, 2, page_size, kv_heads, D]``, zeroed."""
    pages, two, page_size, num_kv_heads, _ = kv_cache.shape
    shape = (pages, two, num_kv_heads, page_size)
    return torch.zeros(shape, dtype=torch.float32, device=kv_cache.device)


def check_kv_dtypes(kv_cache: Tensor, kv_scales: Tensor | None, dtype: torch.dtype) -> None:
    """Assert that the cache is of ``dtype``, or of eight bits with scales that fit."""
    if kv_scales is None:
        assert kv_cache.dtype == dtype
        return
    num_pages, _, page_size, num_kv_heads, _ = kv_cache.shape
    assert kv_cache.dtype in LARGEST and kv_scales.dtype == torch.float32
    assert kv_scales.shape == (num_pages, 2, num_kv_heads, page_size)
    assert kv_scales.is_contiguous() and kv_scales.device == kv_cache.device


def quantise_kv(x_TKD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (codes ``[T, K, D]``, scales ``[T, K]``); int8 rounds half to even.

    A head of zeros has scale 0. NaN or Inf in a head makes its scale so, and the head NaN.
    """
    largest_TK = x_TKD.float().abs().amax(-1)
    scale_TK = largest_TK / LARGEST[dtype]
    inverse_TK = 1 / torch.where(scale_TK > 0, scale_TK, torch.ones_like(scale_TK))
    scaled_TKD = (x_TKD.float() * inverse_TK[..., None]).nan_to_num()
    if dtype == torch.int8:
        scaled_TKD = scaled_TKD.round()
    return scaled_TKD.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale_TK


def dequantise_kv(codes_TKD: Tensor, scale_TK: Tensor) -> Tensor:
    """The inverse, in float32."""
    return codes_TKD.float() * scale_TK[..., None]

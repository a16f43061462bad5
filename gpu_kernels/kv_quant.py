"""Keys and values in eight or four bits: codes, and a scale for each token and head.

Eight bits: x = code * scale. Codes are int8 in -127..127 or fp8 e4m3, scales float32. Four bits
(``INT4``): x = zero + code * scale, codes are -8..7, zero and scale bfloat16. Byte j of a head has
dim j in its low half and dim j + D/2 in its high half, so a tile of bytes is two tiles of codes as
they lie: a key's product is the sum of two of D/2 dims, and values make two halves of the output.

Scales lie apart from the pages, as ``[pages, 2, kv_heads, page_size]``, four bytes each: a head's
scales of one page are neighbours, one or two reads of 32 bytes, where ``[page_size, kv_heads]``
would fetch four times as much. In four bits such an element is the pair (zero, scale): a last axis
of 2, or one int32 with the scale above. In float32 a head of 128 would take 72 bytes instead of 68,
for a step that is 0.3 % smaller: scales are rounded up to bfloat16, zeros are small and to nearest.
Shapes: T tokens, K KV heads, D head dim, C stored elements of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4 = torch.uint8  # what a cache of two codes a byte is stored as
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, INT4: 7.0}

# Added to a float32's bits before the lower 16 are dropped: what rounds to the nearest bfloat16,
# and what rounds away from zero, but for numbers up to 15 steps of float32 above a bfloat16.
TO_NEAREST, AWAY = 0x8000, 0xFFF0
LOWER_BITS = 0xFFFF


def stored_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements in which a cache of ``dtype`` keeps a head."""
    assert dtype != INT4 or head_dim % 4 == 0, "in four bits the head dim is a multiple of 4"
    return head_dim // 2 if dtype == INT4 else head_dim


def bits_of(dtype: torch.dtype) -> int:
    """Of a number in a cache of ``dtype``."""
    return 4 if dtype == INT4 else 8 * dtype.itemsize


def head_dim_of(kv_cache: Tensor) -> int:
    return kv_cache.shape[-1] * (2 if kv_cache.dtype == INT4 else 1)


def new_kv_scales(kv_cache: Tensor) -> Tensor:
    """Return room for the scales of a cache ``[pages, 2, page_size, kv_heads, C]``, zeroed."""
    shape, dtype = scales_of(kv_cache.shape, kv_cache.dtype)
    return torch.zeros(shape, dtype=dtype, device=kv_cache.device)


def scales_of(
    cache_shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the scales of a cache with this shape and of this type."""
    pages, two, page_size, num_kv_heads, _ = cache_shape
    shape = (pages, two, num_kv_heads, page_size)
    return ((*shape, 2), torch.bfloat16) if dtype == INT4 else (shape, torch.float32)


def as_loaded(kv_cache: Tensor, kv_scales: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both as kernels take them: fp8 as bytes, (zero, scale) as int32.

    Masked loads of fp8 know no zero in the interpreter.
    """
    if kv_cache.dtype == torch.float8_e4m3fn:
        return kv_cache.view(torch.uint8), kv_scales
    if kv_cache.dtype == INT4 and kv_scales is not None:
        return kv_cache, kv_scales.view(torch.int32)
    return kv_cache, kv_scales


def check_kv_dtypes(kv_cache: Tensor, kv_scales: Tensor | None, dtype: torch.dtype) -> None:
    """Assert that the cache is of ``dtype``, or of codes with scales that fit."""
    if kv_scales is None:
        assert kv_cache.dtype == dtype
        return
    assert kv_cache.dtype in LARGEST
    assert (kv_scales.shape, kv_scales.dtype) == scales_of(kv_cache.shape, kv_cache.dtype)
    assert kv_scales.is_contiguous() and kv_scales.device == kv_cache.device
    assert kv_cache.dtype != INT4 or kv_cache.shape[-1] % 2 == 0


def quantise_kv(x_TKD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (codes ``[T, K, C]``, scales ``[T, K]``, or pairs ``[T, K, 2]``); rounds half to even.

    A head of zeros has scale 0. NaN or Inf in a head makes its scale so, and the head NaN.
    """
    if dtype == INT4:
        return _quantise_int4(x_TKD.float())
    largest_TK = x_TKD.float().abs().amax(-1)
    scale_TK = largest_TK / LARGEST[dtype]
    scaled_TKD = (x_TKD.float() * _inverse(scale_TK)[..., None]).nan_to_num()
    if dtype == torch.int8:
        scaled_TKD = scaled_TKD.round()
    return scaled_TKD.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale_TK


def dequantise_kv(codes_TKC: Tensor, scale_TK: Tensor) -> Tensor:
    """The inverse, in float32 ``[T, K, D]``."""
    if codes_TKC.dtype != INT4:
        return codes_TKC.float() * scale_TK[..., None]
    halves = (codes_TKC & 15, codes_TKC >> 4)
    codes_TKD = torch.cat([half ^ 8 for half in halves], -1).float() - 8
    zero_TK1, scale_TK1 = scale_TK.float().split(1, dim=-1)
    return torch.addcmul(zero_TK1, codes_TKD, scale_TK1)


def _quantise_int4(x_TKD: Tensor) -> tuple[Tensor, Tensor]:
    """The zero lies in the middle, so it is small where signs differ and loses little as bfloat16.

    The step follows from the zero as rounded: no number is further from its code than half of it.
    """
    low_TK, high_TK = x_TKD.aminmax(dim=-1)
    zero_TK = _to_bfloat16(low_TK + (high_TK - low_TK) * (8 / 15), TO_NEAREST)
    step_TK = torch.maximum((zero_TK - low_TK) * (1 / 8), (high_TK - zero_TK) * (1 / 7))
    step_TK = torch.where(step_TK.isfinite(), _to_bfloat16(step_TK, AWAY), torch.nan)
    scaled_TKD = (x_TKD - zero_TK[..., None]) * _inverse(step_TK)[..., None]
    codes_TKD = scaled_TKD.nan_to_num().round().clamp(-8, 7).to(torch.int8).view(torch.uint8)
    low_TKC, high_TKC = codes_TKD.chunk(2, dim=-1)
    pair_TK2 = torch.stack([zero_TK, step_TK], -1).to(torch.bfloat16)
    return (low_TKC & 15) | (high_TKC << 4), pair_TK2


def _inverse(scale_TK: Tensor) -> Tensor:
    return 1 / torch.where(scale_TK > 0, scale_TK, torch.ones_like(scale_TK))


def _to_bfloat16(x_TK: Tensor, carry: int) -> Tensor:
    """As float32 of which 16 bits are zeros."""
    return ((x_TK.contiguous().view(torch.int32) + carry) & ~LOWER_BITS).view(torch.float32)

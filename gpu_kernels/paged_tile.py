"""What both attention kernels do with the tiles of the paged cache.

Shapes: M packed query rows (row = query * group + head), N cache tokens of a tile, D head dim
(padded to a power of two), H query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.checks import check_page_table
from gpu_kernels.kv_quant import check_kv_dtypes
from gpu_kernels.kv_widen import widen
from gpu_kernels.page_table import PageTable

# What multiplies eight-bit values is rounded to float16: with this factor, scales from 1e-6 to 1023
# (values up to 130,000) keep its precision.
VALUE_SCALE = tl.constexpr(64.0)

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_attention_inputs(
    q: Tensor, kv_cache: Tensor, kv_scales: Tensor | None, pages: PageTable, out: Tensor
) -> None:
    """Assert what both launchers need of ``q`` and ``out`` (``[rows, heads, D]``) and the cache."""
    assert q.ndim == 3 and q.stride(2) == 1 and q.dtype in FLOAT_DTYPES
    assert out.shape == q.shape and out.stride(2) == 1 and out.dtype == q.dtype
    assert kv_cache.ndim == 5 and kv_cache.stride(4) == 1
    assert kv_cache.shape[1:3] == (2, pages.page_size) and kv_cache.shape[4] == q.shape[2]
    assert q.shape[1] % kv_cache.shape[3] == 0, "query heads must be a multiple of kv heads"
    assert q.device == kv_cache.device == pages.indptr_B1.device == out.device
    check_kv_dtypes(kv_cache, kv_scales, q.dtype)
    check_page_table(pages, len(kv_cache))


def kv_args(kv_cache: Tensor, kv_scales: Tensor | None, pages: PageTable) -> dict[str, Any]:
    """Arguments by name of both kernels that say where the keys and values lie."""
    stride_page, stride_v, stride_token, stride_kv_head = kv_cache.stride()[:4]
    is_fp8 = kv_cache.dtype == torch.float8_e4m3fn
    return {
        # as bytes: masked loads of fp8 know no zero in the interpreter
        "kv_ptr": kv_cache.view(torch.uint8) if is_fp8 else kv_cache,
        "kv_scales_ptr": kv_scales,
        "indptr_ptr": pages.indptr_B1,
        "indices_ptr": pages.indices,
        "last_page_len_ptr": pages.last_page_len_B,
        "stride_page": stride_page,
        "stride_v": stride_v,
        "stride_token": stride_token,
        "stride_kv_head": stride_kv_head,
        "HEAD_DIM": kv_cache.shape[4],
        "PAGE_SIZE": pages.page_size,
        "BLOCK_D": padded_dim(kv_cache.shape[4]),
        "IS_QUANTISED": kv_scales is not None,
        "IS_FP8": is_fp8,
    }


def padded_dim(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))


@triton.jit
def request_extent(indptr_ptr, last_page_len_ptr, request, PAGE_SIZE: tl.constexpr):
    """Return the request's first entry in ``indices`` and its number of tokens."""
    first_entry = tl.load(indptr_ptr + request)
    num_pages = tl.load(indptr_ptr + request + 1) - first_entry
    full_pages = tl.maximum(num_pages - 1, 0)
    return first_entry, full_pages * PAGE_SIZE + tl.load(last_page_len_ptr + request)


@triton.jit
def attend(
    q_MD,
    head_kv_ptr,
    head_scales_ptr,
    entries_ptr,
    begin,
    end,
    position_M,
    oldest_M,
    slope_M,
    mask_row_ptr_M,
    max_M,
    sum_M,
    acc_MD,
    stride_page,
    stride_v,
    stride_token,
    stride_scales,
    scale_log2,
    cap_log2,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_QUANTISED: tl.constexpr,
    IS_FP8: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Fold the keys of positions ``[begin, end)`` into the running softmax (max, sum, acc).

    With ``HAS_LIMITS`` a row sees positions ``[oldest_M, position_M]`` of them; without, every row
    sees all. Without ``IS_MASKED`` too, and their number is a multiple of BLOCK_N.
    ``entries_ptr``: the request's pages.
    """
    d_D = tl.arange(0, BLOCK_D)
    n_N = tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = IS_QUANTISED and tl.float32 != q_MD.dtype
    if HALF:
        # codes are exact in float16 and soon converted to it, but it lacks bfloat16's range: q is
        # scaled to 1 and sums of values by VALUE_SCALE
        largest = tl.max(tl.abs(q_MD.to(tl.float32)))
        largest = tl.where(largest > 0.0, largest, 1.0)
        q_MD = (q_MD.to(tl.float32) / largest).to(tl.float16)
        scale_log2 *= largest
        acc_MD *= VALUE_SCALE
    for tile_begin in range(begin, end, BLOCK_N):
        pos_N = tile_begin + n_N
        is_token_N = pos_N < end
        if IS_MASKED:
            page_N = tl.load(entries_ptr + pos_N // PAGE_SIZE, mask=is_token_N, other=0)
        else:
            page_N = tl.load(entries_ptr + pos_N // PAGE_SIZE)
        page_N = page_N.to(tl.int64)
        offset_ND = (page_N * stride_page + (pos_N % PAGE_SIZE) * stride_token)[:, None] + d_D
        k_ptr_ND = head_kv_ptr + offset_ND
        k_ND = _load_tile(k_ptr_ND, is_token_N, d_D, HEAD_DIM, BLOCK_D, IS_FP8, IS_MASKED)
        k_ND = widen(k_ND, q_MD.dtype, IN_PLACE=True)
        logits_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee")
        if IS_QUANTISED:
            scale_ptr_N = head_scales_ptr + page_N * (2 * stride_scales) + pos_N % PAGE_SIZE
            k_scale_N = tl.load(scale_ptr_N, mask=is_token_N, other=0.0)
            logits_MN = logits_MN * (k_scale_N * scale_log2)[None, :]
        else:
            logits_MN = logits_MN * scale_log2
        if HAS_CAP:
            logits_MN = (1.0 - 2.0 / (tl.exp2(logits_MN) + 1.0)) * cap_log2
        if HAS_ALIBI:
            logits_MN += slope_M[:, None] * (pos_N[None, :] - position_M[:, None]).to(tl.float32)
        if IS_MASKED:
            keep_MN = is_token_N[None, :]
            if HAS_LIMITS:
                keep_MN = keep_MN & (pos_N[None, :] <= position_M[:, None])
                keep_MN = keep_MN & (pos_N[None, :] >= oldest_M[:, None])
            if HAS_MASK:
                mask_ptr_MN = mask_row_ptr_M[:, None] + pos_N[None, :]
                keep_MN = keep_MN & (tl.load(mask_ptr_MN, mask=keep_MN, other=0) != 0)
            logits_MN = tl.where(keep_MN, logits_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(logits_MN, 1))
        # -inf - -inf is NaN: a row without any key so far is measured against 0
        base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M) if IS_MASKED else new_max_M
        p_MN = tl.exp2(logits_MN - base_M[:, None])
        decay_M = tl.exp2(max_M - base_M)
        sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
        max_M = new_max_M
        v_ND = _load_tile(
            k_ptr_ND + stride_v, is_token_N, d_D, HEAD_DIM, BLOCK_D, IS_FP8, IS_MASKED
        )
        if IS_QUANTISED:
            v_scale_N = tl.load(scale_ptr_N + stride_scales, mask=is_token_N, other=0.0)
            if HALF:
                v_scale_N *= VALUE_SCALE
            p_MN = p_MN * v_scale_N[None, :]
        if IS_QUANTISED:
            # a new largest logit is rare; instructions, not bytes, are scarce here
            if tl.max((decay_M != 1.0).to(tl.int32)) > 0:
                acc_MD = acc_MD * decay_M[:, None]
        else:
            acc_MD = acc_MD * decay_M[:, None]
        # not in place: products take pairs of tokens, which bytes of a row would be gathered for
        v_ND = widen(v_ND, q_MD.dtype, IN_PLACE=False)
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision="ieee")
    if HALF:
        acc_MD *= 1.0 / VALUE_SCALE
    return max_M, sum_M, acc_MD


@triton.jit
def _load_tile(
    ptr_ND,
    is_token_N,
    d_D,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Rows of the tile; what is no token or beyond the head dim is 0, so that 0 * V stays 0."""
    if IS_MASKED:
        x_ND = tl.load(ptr_ND, mask=is_token_N[:, None] & (d_D < HEAD_DIM)[None, :], other=0)
    elif HEAD_DIM < BLOCK_D:
        x_ND = tl.load(ptr_ND, mask=(d_D < HEAD_DIM)[None, :], other=0)
    else:
        x_ND = tl.load(ptr_ND)
    return x_ND


@triton.jit
def add_sink(max_M, sum_M, acc_MD, sink_log2_M):
    """One more key of every row, with this logit and no value."""
    new_max_M = tl.maximum(max_M, sink_log2_M)
    decay_M = tl.exp2(max_M - new_max_M)
    sum_M = sum_M * decay_M + tl.exp2(sink_log2_M - new_max_M)
    return new_max_M, sum_M, acc_MD * decay_M[:, None]


@triton.jit
def finish_softmax(max_M, sum_M, acc_MD):
    """Return the normalised rows and their ``lse_log2``: (0, -inf) for a row without keys."""
    safe_M = tl.where(sum_M > 0.0, sum_M, 1.0)
    lse_log2_M = tl.where(sum_M > 0.0, max_M + tl.log2(safe_M), float("-inf"))
    # a division takes ten instructions an element
    return acc_MD * (1.0 / safe_M)[:, None], lse_log2_M

"""What both attention kernels do with the tiles of the paged cache.

Shapes: M packed query rows (row = query * group + head), N cache tokens of a tile, D head dim
(padded to a power of two), C elements of a head as stored (D, or D/2 bytes of four-bit codes), H
query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.checks import check_page_table
from gpu_kernels.kv_quant import INT4, as_loaded, check_kv_dtypes, head_dim_of
from gpu_kernels.kv_widen import widen, widen_half, zero_and_scale
from gpu_kernels.page_table import PageTable
from gpu_kernels.whole_numbers import next_power_of_2

# What multiplies values in codes is rounded to float16: with this factor, scales from 1e-6 to 1023
# (values up to 130,000) keep its precision. Scales of four bits are 16 times as large.
VALUE_SCALE = tl.constexpr(64.0)
INT4_VALUE_SCALE = tl.constexpr(4.0)

MIN_DIM = 16  # of a product
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_attention_inputs(
    q: Tensor, kv_cache: Tensor, kv_scales: Tensor | None, pages: PageTable, out: Tensor
) -> None:
    """Assert what both launchers need of ``q`` and ``out`` (``[rows, heads, D]``) and the cache."""
    assert q.ndim == 3 and q.stride(2) == 1 and q.dtype in FLOAT_DTYPES
    assert out.shape == q.shape and out.stride(2) == 1 and out.dtype == q.dtype
    assert kv_cache.ndim == 5 and kv_cache.stride(4) == 1
    assert kv_cache.shape[1:3] == (2, pages.page_size)
    assert head_dim_of(kv_cache) == q.shape[2]
    assert q.shape[1] % kv_cache.shape[3] == 0, "query heads must be a multiple of kv heads"
    assert q.device == kv_cache.device == pages.indptr_B1.device == out.device
    check_kv_dtypes(kv_cache, kv_scales, q.dtype)
    check_page_table(pages, len(kv_cache))


def kv_args(kv_cache: Tensor, kv_scales: Tensor | None, pages: PageTable) -> dict[str, Any]:
    """Arguments by name of both kernels that say where the keys and values lie."""
    stride_page, stride_v, stride_token, stride_kv_head = kv_cache.stride()[:4]
    head_dim = head_dim_of(kv_cache)
    is_int4 = kv_cache.dtype == INT4
    codes, scales = as_loaded(kv_cache, kv_scales)
    return {
        "kv_ptr": codes,
        "kv_scales_ptr": scales,
        "indptr_ptr": pages.indptr_B1,
        "indices_ptr": pages.indices,
        "last_page_len_ptr": pages.last_page_len_B,
        "stride_page": stride_page,
        "stride_v": stride_v,
        "stride_token": stride_token,
        "stride_kv_head": stride_kv_head,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": pages.page_size,
        "BLOCK_D": max(padded_dim(head_dim), 2 * MIN_DIM if is_int4 else MIN_DIM),
        "IS_QUANTISED": kv_scales is not None,
        "IS_INT4": is_int4,
    }


def padded_dim(head_dim: int) -> int:
    return max(MIN_DIM, next_power_of_2(head_dim))


@triton.jit
def head_dims(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_INT4: tl.constexpr):
    """Return the dim of each of BLOCK_D columns, and which have one: four bits pad either half.

    So :func:`attend` takes q and gives its results.
    """
    d_D = tl.arange(0, BLOCK_D)
    if IS_INT4 and HEAD_DIM < BLOCK_D:
        within_D = d_D % (BLOCK_D // 2)
        return within_D + d_D // (BLOCK_D // 2) * (HEAD_DIM // 2), within_D < HEAD_DIM // 2
    else:
        return d_D, d_D < HEAD_DIM


@triton.jit
def split_halves(x_MD):
    """The left and the right half of the columns."""
    M: tl.constexpr = x_MD.shape[0]
    HALF: tl.constexpr = x_MD.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x_MD, [M, 2, HALF]), (0, 2, 1)))


@triton.jit
def join_halves(left_MC, right_MC):
    """The inverse."""
    M: tl.constexpr = left_MC.shape[0]
    D: tl.constexpr = left_MC.shape[1] * 2
    return tl.reshape(tl.permute(tl.join(left_MC, right_MC), (0, 2, 1)), [M, D])


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
    IS_INT4: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Fold the keys of positions ``[begin, end)`` into the running softmax (max, sum, acc).

    With ``HAS_LIMITS`` a row sees positions ``[oldest_M, position_M]`` of them; without, every row
    sees all. Without ``IS_MASKED`` too, and their number is a multiple of BLOCK_N.
    ``entries_ptr``: the request's pages. Columns of q and acc are as :func:`head_dims` has them.
    """
    C: tl.constexpr = BLOCK_D // 2 if IS_INT4 else BLOCK_D
    STORED: tl.constexpr = HEAD_DIM // 2 if IS_INT4 else HEAD_DIM
    c_C = tl.arange(0, C)
    n_N = tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = IS_QUANTISED and tl.float32 != q_MD.dtype
    FACTOR: tl.constexpr = INT4_VALUE_SCALE if IS_INT4 else VALUE_SCALE
    if HALF:
        # codes are exact in float16 and soon converted to it, but it lacks bfloat16's range: q is
        # scaled to 1 and sums of values by FACTOR
        largest = tl.max(tl.abs(q_MD.to(tl.float32)))
        largest = tl.where(largest > 0.0, largest, 1.0)
        q_MD = (q_MD.to(tl.float32) / largest).to(tl.float16)
        scale_log2 *= largest
        acc_MD *= FACTOR
    if IS_INT4:
        q_sum_M = tl.sum(q_MD.to(tl.float32), 1) * scale_log2
        zero_M = tl.zeros_like(max_M)  # sums of what values are measured from
        q_MC, q_high_MC = split_halves(q_MD)
        acc_MC, high_MC = split_halves(acc_MD)
    else:
        q_MC, acc_MC = q_MD, acc_MD
    for tile_begin in range(begin, end, BLOCK_N):
        pos_N = tile_begin + n_N
        is_token_N = pos_N < end
        if IS_MASKED:
            page_N = tl.load(entries_ptr + pos_N // PAGE_SIZE, mask=is_token_N, other=0)
        else:
            page_N = tl.load(entries_ptr + pos_N // PAGE_SIZE)
        page_N = page_N.to(tl.int64)
        offset_NC = (page_N * stride_page + (pos_N % PAGE_SIZE) * stride_token)[:, None] + c_C
        k_ptr_NC = head_kv_ptr + offset_NC
        k_NC = _load_tile(k_ptr_NC, is_token_N, c_C, STORED, C, IS_MASKED)
        if IS_INT4:
            k_low_NC = widen_half(k_NC, q_MD.dtype, HIGH=False, IN_PLACE=True)
            k_high_NC = widen_half(k_NC, q_MD.dtype, HIGH=True, IN_PLACE=True)
            logits_MN = tl.dot(q_MC, tl.trans(k_low_NC), input_precision="ieee")
            logits_MN = tl.dot(q_high_MC, tl.trans(k_high_NC), logits_MN, input_precision="ieee")
        else:
            k_NC = widen(k_NC, q_MD.dtype, IN_PLACE=True)
            logits_MN = tl.dot(q_MC, tl.trans(k_NC), input_precision="ieee")
        if IS_QUANTISED:
            scale_ptr_N = head_scales_ptr + page_N * (2 * stride_scales) + pos_N % PAGE_SIZE
            k_scale_N = tl.load(scale_ptr_N, mask=is_token_N, other=0)
            if IS_INT4:
                k_zero_N, k_scale_N = zero_and_scale(k_scale_N)
            logits_MN = logits_MN * (k_scale_N * scale_log2)[None, :]
            if IS_INT4:
                logits_MN += q_sum_M[:, None] * k_zero_N[None, :]
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
        v_NC = _load_tile(k_ptr_NC + stride_v, is_token_N, c_C, STORED, C, IS_MASKED)
        if IS_QUANTISED:
            v_scale_N = tl.load(scale_ptr_N + stride_scales, mask=is_token_N, other=0)
            if IS_INT4:
                v_zero_N, v_scale_N = zero_and_scale(v_scale_N)
                zero_M = zero_M * decay_M + tl.sum(p_MN * v_zero_N[None, :], 1)
            if HALF:
                v_scale_N *= FACTOR
            p_MN = p_MN * v_scale_N[None, :]
            # a new largest logit is rare; instructions, not bytes, are scarce here
            if tl.max((decay_M != 1.0).to(tl.int32)) > 0:
                acc_MC = acc_MC * decay_M[:, None]
                if IS_INT4:
                    high_MC = high_MC * decay_M[:, None]
        else:
            acc_MC = acc_MC * decay_M[:, None]
        # not in place: products take pairs of tokens, which bytes of a row would be gathered for
        if IS_INT4:
            weight_MN = p_MN.to(q_MD.dtype)
            v_low_NC = widen_half(v_NC, q_MD.dtype, HIGH=False, IN_PLACE=False)
            acc_MC = tl.dot(weight_MN, v_low_NC, acc_MC, input_precision="ieee")
            v_high_NC = widen_half(v_NC, q_MD.dtype, HIGH=True, IN_PLACE=False)
            high_MC = tl.dot(weight_MN, v_high_NC, high_MC, input_precision="ieee")
        else:
            v_NC = widen(v_NC, q_MD.dtype, IN_PLACE=False)
            acc_MC = tl.dot(p_MN.to(v_NC.dtype), v_NC, acc_MC, input_precision="ieee")
    acc_MD = join_halves(acc_MC, high_MC) if IS_INT4 else acc_MC
    if HALF:
        acc_MD *= 1.0 / FACTOR
    if IS_INT4:
        acc_MD += zero_M[:, None]
    return max_M, sum_M, acc_MD


@triton.jit
def _load_tile(
    ptr_NC, is_token_N, c_C, STORED: tl.constexpr, C: tl.constexpr, IS_MASKED: tl.constexpr
):
    """Rows of the tile; what is no token or beyond the head dim is 0, so that 0 * V stays 0."""
    if IS_MASKED:
        x_NC = tl.load(ptr_NC, mask=is_token_N[:, None] & (c_C < STORED)[None, :], other=0)
    elif STORED < C:
        x_NC = tl.load(ptr_NC, mask=(c_C < STORED)[None, :], other=0)
    else:
        x_NC = tl.load(ptr_NC)
    return x_NC


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

"""Ragged queries over the paged cache: chunked prefill and mixed batches in one launch.

Causal and aligned at the end: query i of a request stands at position kv_len - qo_len + i, and
the chunk's own K and V are in the cache already. The query heads of a KV head are packed as rows,
row = query * group + head, so short chunks still fill a tile.
Shapes: T query tokens, B requests, H query heads, K KV heads, D head dim, M packed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.attention_reference import attention_prefill_reference
from gpu_kernels.attention_variant import IN_KERNEL_LOG2_E, PLAIN, Variant, logits_args
from gpu_kernels.device import family
from gpu_kernels.kv_quant import bits_of
from gpu_kernels.page_table import PageTable
from gpu_kernels.paged_tile import (
    add_sink,
    attend,
    check_attention_inputs,
    finish_softmax,
    head_dims,
    kv_args,
    padded_dim,
    request_extent,
)
from gpu_kernels.tuned import choose

__all__ = ["attention_prefill", "attention_prefill_reference"]


def attention_prefill(
    q_THD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    qo_indptr_B1: Tensor,
    *,
    sm_scale: float,
    max_qo_len: int,
    is_causal: bool = True,
    variant: Variant = PLAIN,
    kv_scales: Tensor | None = None,
    positions_T: Tensor | None = None,
    custom_mask: Tensor | None = None,
    mask_indptr_B1: Tensor | None = None,
    out: Tensor | None = None,
    lse_log2: Tensor | None = None,
) -> Tensor:
    """Return attention of rows ``qo_indptr_B1[i]:qo_indptr_B1[i + 1]`` for each request i.

    ``qo_indptr_B1`` is int32 on the device; a request may have no queries. ``max_qo_len``, the
    longest request's queries, chooses the tile only: a wrong value costs time, not correctness.
    ``positions_T``, int32, replaces the queries' positions in their requests; without
    ``is_causal`` they see all of the cache. ``custom_mask``, flat bool, True: keep, holds
    [qo_len, kv_len] of each request from ``mask_indptr_B1`` (int64) on, and is one more condition.
    ``lse_log2``, float32 [T, H], receives the base-2 log-sum-exp, sinks included. Queries without
    any key get zeros, and -inf. ``kv_scales``: see :mod:`gpu_kernels.kv_quant`.
    """
    out = torch.empty_like(q_THD) if out is None else out
    check_attention_inputs(q_THD, kv_cache, kv_scales, pages, out)
    assert qo_indptr_B1.shape == pages.indptr_B1.shape and qo_indptr_B1.dtype == torch.int32
    assert qo_indptr_B1.device == q_THD.device and qo_indptr_B1.is_contiguous()
    num_tokens, num_heads, head_dim = q_THD.shape
    _check_options(q_THD, positions_T, custom_mask, mask_indptr_B1, lse_log2)
    assert positions_T is None or is_causal
    if num_tokens == 0:
        return out
    num_kv_heads = kv_cache.shape[3]
    group = num_heads // num_kv_heads
    tile = choose(
        "attention_prefill" if q_THD.element_size() == 2 else "attention_prefill_float32",
        family(q_THD.device),
        rows=max_qo_len * group,
        row_bytes=padded_dim(head_dim) * q_THD.element_size(),
        bits=bits_of(kv_cache.dtype),
    )
    # the last tile of every request may be partly empty: one more tile each is always enough
    num_blocks = num_tokens * group // tile["BLOCK_M"] + pages.num_requests
    _prefill_kernel[(num_kv_heads, num_blocks)](
        q_ptr=q_THD,
        qo_indptr_ptr=qo_indptr_B1,
        positions_ptr=positions_T,
        mask_ptr=custom_mask,
        mask_indptr_ptr=mask_indptr_B1,
        sinks_ptr=variant.sinks_H,
        out_ptr=out,
        lse_ptr=lse_log2,
        stride_q_token=q_THD.stride(0),
        stride_q_head=q_THD.stride(1),
        stride_out_token=out.stride(0),
        stride_out_head=out.stride(1),
        num_requests=pages.num_requests,
        window_left=variant.window_left,
        GROUP=group,
        IS_CAUSAL=is_causal,
        HAS_POSITIONS=positions_T is not None,
        HAS_MASK=custom_mask is not None,
        HAS_WINDOW=variant.window_left >= 0,
        HAS_SINKS=variant.sinks_H is not None,
        HAS_LSE=lse_log2 is not None,
        **kv_args(kv_cache, kv_scales, pages),
        **logits_args(variant, num_heads, sm_scale, q_THD.device),
        **tile,
    )
    return out


def _check_options(
    q_THD: Tensor,
    positions_T: Tensor | None,
    custom_mask: Tensor | None,
    mask_indptr_B1: Tensor | None,
    lse_log2: Tensor | None,
) -> None:
    if positions_T is not None:
        assert positions_T.shape == q_THD.shape[:1] and positions_T.dtype == torch.int32
        assert positions_T.is_contiguous() and positions_T.device == q_THD.device
    assert (custom_mask is None) == (mask_indptr_B1 is None), "a mask and where each begins"
    if custom_mask is not None and mask_indptr_B1 is not None:
        assert custom_mask.ndim == 1 and custom_mask.dtype == torch.bool
        assert custom_mask.is_contiguous() and mask_indptr_B1.dtype == torch.int64
        assert custom_mask.device == mask_indptr_B1.device == q_THD.device
    if lse_log2 is not None:
        assert lse_log2.shape == q_THD.shape[:2] and lse_log2.dtype == torch.float32
        assert lse_log2.is_contiguous() and lse_log2.device == q_THD.device


@triton.jit
def _find_request(qo_indptr_ptr, block, num_requests, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return the request that ``block`` belongs to and that request's first block.

    Request i starts at block ``first_row_i // BLOCK_M + i``, so it has at least
    ceil(rows_i / BLOCK_M) blocks; the last request to start not after ``block`` is searched.
    """
    low = block * 0
    high = low + num_requests
    first_block = low
    while high - low > 1:
        middle = (low + high) // 2
        middle_block = tl.load(qo_indptr_ptr + middle) * GROUP // BLOCK_M + middle
        is_before = middle_block <= block
        low = tl.where(is_before, middle, low)
        first_block = tl.where(is_before, middle_block, first_block)
        high = tl.where(is_before, high, middle)
    return low, first_block


@triton.jit(do_not_specialize=["num_requests", "window_left"])
def _prefill_kernel(
    q_ptr,
    kv_ptr,
    kv_scales_ptr,
    indptr_ptr,
    indices_ptr,
    last_page_len_ptr,
    qo_indptr_ptr,
    positions_ptr,
    mask_ptr,
    mask_indptr_ptr,
    slopes_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_v,
    stride_token,
    stride_kv_head,
    stride_out_token,
    stride_out_head,
    num_requests,
    window_left,
    scale_log2,
    cap_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_QUANTISED: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the last rows see most keys: they go first
    request, first_block = _find_request(qo_indptr_ptr, block, num_requests, GROUP, BLOCK_M)
    first_row = (block - first_block) * BLOCK_M
    first_token = tl.load(qo_indptr_ptr + request)
    qo_len = tl.load(qo_indptr_ptr + request + 1) - first_token
    if first_row >= qo_len * GROUP:
        return
    first_entry, kv_len = request_extent(indptr_ptr, last_page_len_ptr, request, PAGE_SIZE)

    d_D, is_dim_D = head_dims(HEAD_DIM, BLOCK_D, IS_INT4)
    row_M = first_row + tl.arange(0, BLOCK_M)
    query_M = row_M // GROUP
    is_query_M = query_M < qo_len
    head_M = kv_head * GROUP + row_M % GROUP
    token_M = (first_token + query_M).to(tl.int64)
    mask_MD = is_query_M[:, None] & is_dim_D[None, :]
    q_offset_MD = (token_M * stride_q_token + head_M * stride_q_head)[:, None] + d_D
    q_MD = tl.load(q_ptr + q_offset_MD, mask=mask_MD, other=0.0)

    if HAS_POSITIONS:
        position_M = tl.load(positions_ptr + token_M, mask=is_query_M, other=-1)
    elif IS_CAUSAL:
        position_M = kv_len - qo_len + query_M
    else:
        position_M = tl.zeros([BLOCK_M], tl.int32) + kv_len - 1
    oldest_M = tl.zeros([BLOCK_M], tl.int32)
    if HAS_WINDOW:
        oldest_M = tl.maximum(position_M - window_left, 0)
    begin = tl.maximum(tl.min(oldest_M, 0), 0)
    end = tl.minimum(tl.max(position_M, 0) + 1, kv_len)
    # tiles that every row sees whole need no mask
    whole_end = tl.minimum(tl.min(position_M, 0) + 1, end)
    whole_end = begin + tl.maximum(whole_end - begin, 0) // BLOCK_N * BLOCK_N
    if HAS_WINDOW or HAS_MASK:
        whole_end = begin
    mask_row_ptr_M = row_M
    if HAS_MASK:
        mask_row_M = tl.load(mask_indptr_ptr + request) + query_M.to(tl.int64) * kv_len
        mask_row_ptr_M = mask_ptr + tl.where(is_query_M, mask_row_M, 0)
    slope_M = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slope_M = tl.load(slopes_ptr + head_M) * IN_KERNEL_LOG2_E
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_scales_ptr = kv_scales_ptr + kv_head * PAGE_SIZE if IS_QUANTISED else kv_scales_ptr
    for IS_MASKED in tl.static_range(0, 2):
        max_M, sum_M, acc_MD = attend(
            q_MD,
            kv_ptr + kv_head * stride_kv_head,
            head_scales_ptr,
            indices_ptr + first_entry,
            whole_end if IS_MASKED else begin,
            end if IS_MASKED else whole_end,
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
            num_kv_heads * PAGE_SIZE,
            scale_log2,
            cap_log2,
            HEAD_DIM,
            PAGE_SIZE,
            BLOCK_N,
            BLOCK_D,
            IS_QUANTISED,
            IS_INT4,
            HAS_CAP,
            HAS_ALIBI,
            HAS_MASK and IS_MASKED,
            IS_MASKED,
            IS_MASKED,
        )
    if HAS_SINKS:
        sink_log2_M = tl.load(sinks_ptr + head_M) * IN_KERNEL_LOG2_E
        max_M, sum_M, acc_MD = add_sink(max_M, sum_M, acc_MD, sink_log2_M)
    out_MD, lse_log2_M = finish_softmax(max_M, sum_M, acc_MD)
    out_offset_MD = (token_M * stride_out_token + head_M * stride_out_head)[:, None] + d_D
    tl.store(out_ptr + out_offset_MD, out_MD.to(out_ptr.dtype.element_ty), mask=mask_MD)
    if HAS_LSE:
        tl.store(lse_ptr + token_M * num_kv_heads * GROUP + head_M, lse_log2_M, mask=is_query_M)

"""Ragged queries over the paged cache: chunked prefill and mixed batches in one launch.

Causal and aligned at the end: query i of a request stands at position kv_len - qo_len + i, and
the chunk's own K and V are in the cache already. The query heads of a KV head are packed as rows,
row = query * group + head, so short chunks still fill a tile.
Shapes: T query tokens, B requests, H query heads, K KV heads, D head dim, M packed rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.page_table import PageTable, gather_kv
from gpu_kernels.paged_tile import (
    LOG2_E,
    check_attention_inputs,
    finish_softmax,
    load_kv_tile,
    request_extent,
    softmax_step,
    tile_shape,
)


def attention_prefill(
    q_THD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    qo_indptr_B1: Tensor,
    *,
    sm_scale: float,
    max_qo_len: int,
    window_left: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return causal attention of rows ``qo_indptr_B1[i]:qo_indptr_B1[i + 1]`` for each request i.

    ``qo_indptr_B1`` is int32 on the device; a request may have no queries. ``window_left`` keeps
    that many earlier tokens and the token itself; -1 keeps all. ``max_qo_len``, the longest
    request's queries, chooses the tile only: a wrong value costs time, not correctness.
    """
    out = torch.empty_like(q_THD) if out is None else out
    check_attention_inputs(q_THD, kv_cache, pages, out)
    assert qo_indptr_B1.shape == pages.indptr_B1.shape and qo_indptr_B1.dtype == torch.int32
    assert qo_indptr_B1.device == q_THD.device and qo_indptr_B1.is_contiguous()
    num_tokens, num_heads, head_dim = q_THD.shape
    if num_tokens == 0:
        return out
    num_kv_heads = kv_cache.shape[3]
    group = num_heads // num_kv_heads
    tile = tile_shape(head_dim, q_THD.dtype)
    widest = 64 if tile.row_bytes <= 256 else 32
    block_m = max(16, min(widest, triton.next_power_of_2(max_qo_len * group)))
    # the last tile of every request may be partly empty: one more tile each is always enough
    num_blocks = num_tokens * group // block_m + pages.num_requests
    _prefill_kernel[(num_blocks, num_kv_heads)](
        q_THD,
        kv_cache,
        pages.indptr_B1,
        pages.indices,
        pages.last_page_len_B,
        qo_indptr_B1,
        out,
        q_THD.stride(0),
        q_THD.stride(1),
        *kv_cache.stride()[:4],
        out.stride(0),
        out.stride(1),
        pages.num_requests,
        window_left,
        sm_scale * LOG2_E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=pages.page_size,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        num_warps=4,
        num_stages=2,
    )
    return out


def attention_prefill_reference(
    q_THD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    qo_indptr_B1: Tensor,
    *,
    sm_scale: float,
    window_left: int = -1,
) -> Tensor:
    """The same in plain torch, computed and returned in float32."""
    out_THD = torch.zeros(q_THD.shape, dtype=torch.float32, device=q_THD.device)
    for request, (begin, end) in enumerate(pairwise(qo_indptr_B1.tolist())):
        keys, values = (x.float() for x in gather_kv(kv_cache, pages, request))
        out_THD[begin:end] = _dense_attention(
            q_THD[begin:end].float(), keys, values, sm_scale, window_left
        )
    return out_THD


def _dense_attention(
    q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, sm_scale: float, window_left: int
) -> Tensor:
    num_queries, kv_len = q_QHD.shape[0], k_SKD.shape[0]
    group = q_QHD.shape[1] // k_SKD.shape[1]
    k_SHD, v_SHD = (x.repeat_interleave(group, dim=1) for x in (k_SKD, v_SKD))
    position_Q = torch.arange(kv_len - num_queries, kv_len, device=q_QHD.device)[:, None]
    position_S = torch.arange(kv_len, device=q_QHD.device)
    keep_QS = position_S <= position_Q
    if window_left >= 0:
        keep_QS &= position_S >= position_Q - window_left
    logits_HQS = torch.einsum("qhd,shd->hqs", q_QHD, k_SHD) * sm_scale
    weights_HQS = logits_HQS.masked_fill(~keep_QS, float("-inf")).softmax(-1)
    return torch.einsum("hqs,shd->qhd", weights_HQS.nan_to_num(), v_SHD)


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
    indptr_ptr,
    indices_ptr,
    last_page_len_ptr,
    qo_indptr_ptr,
    out_ptr,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    block = tl.program_id(0)
    kv_head = tl.program_id(1)
    request, first_block = _find_request(qo_indptr_ptr, block, num_requests, GROUP, BLOCK_M)
    first_row = (block - first_block) * BLOCK_M
    first_token = tl.load(qo_indptr_ptr + request)
    qo_len = tl.load(qo_indptr_ptr + request + 1) - first_token
    if first_row >= qo_len * GROUP:
        return
    first_entry, kv_len = request_extent(indptr_ptr, last_page_len_ptr, request, PAGE_SIZE)

    d_D = tl.arange(0, BLOCK_D)
    row_M = first_row + tl.arange(0, BLOCK_M)
    query_M = row_M // GROUP
    head_M = kv_head * GROUP + row_M % GROUP
    token_M = (first_token + query_M).to(tl.int64)
    mask_MD = (query_M < qo_len)[:, None] & (d_D < HEAD_DIM)[None, :]
    q_offset_MD = (token_M * stride_q_token + head_M * stride_q_head)[:, None] + d_D
    q_MD = tl.load(q_ptr + q_offset_MD, mask=mask_MD, other=0.0)

    position_M = kv_len - qo_len + query_M
    oldest_M = tl.where(window_left < 0, 0, tl.maximum(position_M - window_left, 0))
    begin = tl.min(oldest_M, 0)
    end = tl.minimum(tl.max(position_M, 0) + 1, kv_len)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_kv_ptr = kv_ptr + kv_head * stride_kv_head
    for tile_begin in range(begin, end, BLOCK_N):
        pos_N = tile_begin + tl.arange(0, BLOCK_N)
        k_ND, v_ND = load_kv_tile(
            head_kv_ptr,
            indices_ptr,
            first_entry,
            pos_N,
            end,
            d_D,
            stride_page,
            stride_v,
            stride_token,
            HEAD_DIM,
            PAGE_SIZE,
        )
        keep_MN = (pos_N[None, :] <= position_M[:, None]) & (pos_N[None, :] >= oldest_M[:, None])
        max_M, sum_M, acc_MD = softmax_step(
            q_MD, k_ND, v_ND, keep_MN & (pos_N < end)[None, :], scale_log2, max_M, sum_M, acc_MD
        )
    out_MD, _ = finish_softmax(max_M, sum_M, acc_MD)
    out_offset_MD = (token_M * stride_out_token + head_M * stride_out_head)[:, None] + d_D
    tl.store(out_ptr + out_offset_MD, out_MD.to(out_ptr.dtype.element_ty), mask=mask_MD)

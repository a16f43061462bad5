"""One query token per request over the paged cache: split KV, then merge.

Memory-bound: each program reads a chunk of one KV head once, for all query heads of its group
(packed as rows so that the products run on tensor cores). No atomics: the result depends on the
plan alone. Shapes: B requests, H query heads, D head dim, W work items of the plan, M packed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.attention_prefill import attention_prefill_reference
from gpu_kernels.decode_plan import DecodePlan, plan_decode
from gpu_kernels.page_table import PageTable
from gpu_kernels.paged_tile import (
    LOG2_E,
    check_attention_inputs,
    finish_softmax,
    load_kv_tile,
    request_extent,
    softmax_step,
    tile_shape,
)

__all__ = [
    "DecodePlan",
    "attention_decode",
    "attention_decode_reference",
    "max_decode_programs",
    "merge_parts",
    "plan_decode",
]

MERGE_BLOCK = 16  # parts merged at a time


def max_decode_programs(device: torch.device | str) -> int:
    """Programs that ``device`` runs at once: ``plan_decode``'s ``max_programs``."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def attention_decode(
    q_BHD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    plan: DecodePlan,
    *,
    sm_scale: float,
    window_left: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """Return attention of each request's newest token, whose own K and V are in the cache already.

    ``window_left`` keeps that many earlier tokens and the token itself; -1 keeps all. An empty
    request gets zeros. ``plan`` lies on the same device and was made for these lengths.
    """
    out = torch.empty_like(q_BHD) if out is None else out
    check_attention_inputs(q_BHD, kv_cache, pages, out)
    num_requests, num_heads, head_dim = q_BHD.shape
    assert plan.num_requests == pages.num_requests == num_requests
    assert plan.request_indices.device == q_BHD.device
    if num_requests == 0:
        return out
    part, lse_log2_WH = out, None
    if plan.is_split:
        part = q_BHD.new_empty((plan.num_work, num_heads, head_dim), dtype=torch.float32)
        lse_log2_WH = q_BHD.new_empty((plan.num_work, num_heads), dtype=torch.float32)
    _launch_decode(q_BHD, kv_cache, pages, plan, part, lse_log2_WH, sm_scale, window_left)
    if lse_log2_WH is not None:
        merge_parts(part, lse_log2_WH, plan.o_indptr, out)
    return out


def merge_parts(part_WHD: Tensor, lse_log2_WH: Tensor, o_indptr_B1: Tensor, out: Tensor) -> None:
    """Combine attention over disjoint keys into ``out``, weighting by ``2 ** lse_log2``.

    A part with ``lse_log2`` of -inf (and zeros in ``part_WHD``) changes nothing.
    """
    num_requests, num_heads, head_dim = out.shape
    assert part_WHD.is_contiguous() and lse_log2_WH.is_contiguous() and out.stride(2) == 1
    assert part_WHD.shape[1:] == out.shape[1:] and lse_log2_WH.shape == part_WHD.shape[:2]
    assert o_indptr_B1.shape == (num_requests + 1,) and o_indptr_B1.dtype == torch.int32
    _merge_kernel[(num_requests, num_heads)](
        part_WHD,
        lse_log2_WH,
        o_indptr_B1,
        out,
        out.stride(0),
        out.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_W=MERGE_BLOCK,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


def attention_decode_reference(
    q_BHD: Tensor, kv_cache: Tensor, pages: PageTable, *, sm_scale: float, window_left: int = -1
) -> Tensor:
    """The same in plain torch and float32: a prefill of one token per request."""
    qo_indptr_B1 = torch.arange(q_BHD.shape[0] + 1, dtype=torch.int32)
    return attention_prefill_reference(
        q_BHD, kv_cache, pages, qo_indptr_B1, sm_scale=sm_scale, window_left=window_left
    )


def _launch_decode(
    q_BHD: Tensor,
    kv_cache: Tensor,
    pages: PageTable,
    plan: DecodePlan,
    part: Tensor,
    lse_log2_WH: Tensor | None,
    sm_scale: float,
    window_left: int,
) -> None:
    num_heads, head_dim = q_BHD.shape[1:]
    num_kv_heads = kv_cache.shape[3]
    tile = tile_shape(head_dim, q_BHD.dtype)
    group = num_heads // num_kv_heads
    _decode_kernel[(plan.num_work, num_kv_heads)](
        q_BHD,
        kv_cache,
        pages.indptr_B1,
        pages.indices,
        pages.last_page_len_B,
        plan.request_indices,
        plan.kv_tile_indices,
        part,
        lse_log2_WH,
        q_BHD.stride(0),
        q_BHD.stride(1),
        *kv_cache.stride()[:4],
        part.stride(0),
        part.stride(1),
        plan.chunk_size,
        window_left,
        sm_scale * LOG2_E,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=pages.page_size,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tile.block_n,
        BLOCK_D=tile.block_d,
        IS_SPLIT=plan.is_split,
        num_warps=4,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["chunk_size", "window_left"])
def _decode_kernel(
    q_ptr,
    kv_ptr,
    indptr_ptr,
    indices_ptr,
    last_page_len_ptr,
    request_ptr,
    kv_tile_ptr,
    part_ptr,
    lse_ptr,
    stride_q_request,
    stride_q_head,
    stride_page,
    stride_v,
    stride_token,
    stride_kv_head,
    stride_part,
    stride_part_head,
    chunk_size,
    window_left,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    work = tl.program_id(0)
    kv_head = tl.program_id(1)
    request = tl.load(request_ptr + work)
    first_entry, kv_len = request_extent(indptr_ptr, last_page_len_ptr, request, PAGE_SIZE)
    first_pos = tl.where(window_left < 0, 0, tl.maximum(kv_len - 1 - window_left, 0))
    begin = first_pos + tl.load(kv_tile_ptr + work) * chunk_size
    end = tl.minimum(begin + chunk_size, kv_len)

    d_D = tl.arange(0, BLOCK_D)
    row_M = tl.arange(0, BLOCK_M)
    head_M = kv_head * GROUP + row_M
    mask_MD = (row_M < GROUP)[:, None] & (d_D < HEAD_DIM)[None, :]
    q_offset_MD = request.to(tl.int64) * stride_q_request + head_M[:, None] * stride_q_head + d_D
    q_MD = tl.load(q_ptr + q_offset_MD, mask=mask_MD, other=0.0)

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
        keep_MN = (pos_N < end)[None, :]
        max_M, sum_M, acc_MD = softmax_step(
            q_MD, k_ND, v_ND, keep_MN, scale_log2, max_M, sum_M, acc_MD
        )
    part_MD, lse_log2_M = finish_softmax(max_M, sum_M, acc_MD)

    if IS_SPLIT:
        target = work
        num_heads = tl.num_programs(1) * GROUP
        tl.store(lse_ptr + work * num_heads + head_M, lse_log2_M, mask=row_M < GROUP)
    else:
        target = request
    out_offset_MD = target.to(tl.int64) * stride_part + head_M[:, None] * stride_part_head + d_D
    tl.store(part_ptr + out_offset_MD, part_MD.to(part_ptr.dtype.element_ty), mask=mask_MD)


@triton.jit
def _merge_kernel(
    part_ptr,
    lse_ptr,
    o_indptr_ptr,
    out_ptr,
    stride_request,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    request = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(o_indptr_ptr + request)
    end = tl.load(o_indptr_ptr + request + 1)
    d_D = tl.arange(0, BLOCK_D)
    running_max = float("-inf")
    weight_sum = 0.0
    acc_D = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_W):
        work_W = first + tl.arange(0, BLOCK_W)
        row_W = work_W.to(tl.int64) * NUM_HEADS + head
        lse_W = tl.load(lse_ptr + row_W, mask=work_W < end, other=float("-inf"))
        mask_WD = (work_W < end)[:, None] & (d_D < HEAD_DIM)[None, :]
        part_WD = tl.load(part_ptr + row_W[:, None] * HEAD_DIM + d_D, mask=mask_WD, other=0.0)
        new_max = tl.maximum(running_max, tl.max(lse_W, 0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight_W = tl.exp2(lse_W - base)
        decay = tl.exp2(running_max - base)
        acc_D = acc_D * decay + tl.sum(weight_W[:, None] * part_WD, 0)
        weight_sum = weight_sum * decay + tl.sum(weight_W, 0)
        running_max = new_max
    out_D = acc_D / tl.where(weight_sum > 0.0, weight_sum, 1.0)
    offset_D = request.to(tl.int64) * stride_request + head * stride_head + d_D
    tl.store(out_ptr + offset_D, out_D.to(out_ptr.dtype.element_ty), mask=d_D < HEAD_DIM)

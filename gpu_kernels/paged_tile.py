"""What both attention kernels do with one tile of the paged cache.

Shapes: M packed query rows, N cache tokens of the tile, D head dim (padded to a power of two).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.page_table import PageTable

LOG2_E = 1.4426950408889634
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class TileShape:
    """Compile-time sizes of a tile; they decide registers and shared memory."""

    block_d: int
    block_n: int
    row_bytes: int


def tile_shape(head_dim: int, dtype: torch.dtype) -> TileShape:
    """Return sizes whose K and V tiles together take 32 KiB of shared memory per stage at most."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    row_bytes = block_d * dtype.itemsize
    return TileShape(block_d, max(16, min(64, 16384 // row_bytes)), row_bytes)


def check_attention_inputs(q: Tensor, kv_cache: Tensor, pages: PageTable, out: Tensor) -> None:
    """Assert what both launchers need of ``q`` and ``out`` (``[rows, heads, D]``) and the cache."""
    assert q.ndim == 3 and q.stride(2) == 1 and q.dtype in FLOAT_DTYPES
    assert out.shape == q.shape and out.stride(2) == 1 and out.dtype == q.dtype
    assert kv_cache.ndim == 5 and kv_cache.stride(4) == 1 and kv_cache.dtype == q.dtype
    assert kv_cache.shape[1:3] == (2, pages.page_size) and kv_cache.shape[4] == q.shape[2]
    assert q.shape[1] % kv_cache.shape[3] == 0, "query heads must be a multiple of kv heads"
    assert q.device == kv_cache.device == pages.indptr_B1.device == out.device


@triton.jit
def request_extent(indptr_ptr, last_page_len_ptr, request, PAGE_SIZE: tl.constexpr):
    """Return the request's first entry in ``indices`` and its number of tokens."""
    first_entry = tl.load(indptr_ptr + request)
    num_pages = tl.load(indptr_ptr + request + 1) - first_entry
    full_pages = tl.maximum(num_pages - 1, 0)
    return first_entry, full_pages * PAGE_SIZE + tl.load(last_page_len_ptr + request)


@triton.jit
def load_kv_tile(
    kv_ptr,
    indices_ptr,
    first_entry,
    pos_N,
    end,
    d_D,
    stride_page,
    stride_v,
    stride_token,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Load K and V of the positions below ``end``; the rest is 0, so that 0 * V stays 0."""
    valid_N = pos_N < end
    page_N = tl.load(indices_ptr + first_entry + pos_N // PAGE_SIZE, mask=valid_N, other=0)
    row_N = page_N.to(tl.int64) * stride_page + (pos_N % PAGE_SIZE) * stride_token
    offset_ND = row_N[:, None] + d_D[None, :]
    mask_ND = valid_N[:, None] & (d_D < HEAD_DIM)[None, :]
    k_ND = tl.load(kv_ptr + offset_ND, mask=mask_ND, other=0.0)
    v_ND = tl.load(kv_ptr + stride_v + offset_ND, mask=mask_ND, other=0.0)
    return k_ND, v_ND


@triton.jit
def softmax_step(q_MD, k_ND, v_ND, keep_MN, scale_log2, max_M, sum_M, acc_MD):
    """Fold one tile into the running softmax; a row with nothing kept so far stays (-inf, 0, 0)."""
    logits_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
    logits_MN = tl.where(keep_MN, logits_MN, float("-inf"))
    new_max_M = tl.maximum(max_M, tl.max(logits_MN, 1))
    # -inf - -inf is NaN: a row without any key so far is measured against 0
    base_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
    p_MN = tl.exp2(logits_MN - base_M[:, None])
    decay_M = tl.exp2(max_M - base_M)
    sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
    acc_MD = acc_MD * decay_M[:, None]
    acc_MD += tl.dot(p_MN.to(v_ND.dtype), v_ND, input_precision="ieee")
    return new_max_M, sum_M, acc_MD


@triton.jit
def finish_softmax(max_M, sum_M, acc_MD):
    """Return the normalised rows and their ``lse_log2``: (0, -inf) for a row without keys."""
    safe_M = tl.where(sum_M > 0.0, sum_M, 1.0)
    lse_log2_M = tl.where(sum_M > 0.0, max_M + tl.log2(safe_M), float("-inf"))
    return acc_MD / safe_M[:, None], lse_log2_M

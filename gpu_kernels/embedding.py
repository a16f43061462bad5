"""Rows of a table by token id.

Shapes: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.checks import check_range
from gpu_kernels.device import family
from gpu_kernels.tuned import choose
from gpu_kernels.whole_numbers import cdiv

HOST = torch.device("cpu")


def embedding(
    ids_T: Tensor, table_VH: Tensor, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return ``table_VH[ids_T] * scale`` as ``[T, H]`` in the table's dtype, where the ids are.

    The table lies there too, or in pinned host memory, from which rows come over PCIe.
    ``ids_T`` is int32 or int64. A scaled row is computed in float32 and rounded once. An id outside
    the vocabulary (-1 of a draw that failed) reads nothing and gives a row of NaN.
    """
    num_tokens, (vocab, hidden) = ids_T.shape[0], table_VH.shape
    if out is None:
        out = torch.empty((num_tokens, hidden), dtype=table_VH.dtype, device=ids_T.device)
    assert ids_T.shape == (num_tokens,) and ids_T.dtype in (torch.int32, torch.int64)
    assert table_VH.stride(1) == 1 and table_VH.is_floating_point()
    assert out.shape == (num_tokens, hidden) and out.stride(1) == 1 and out.dtype == table_VH.dtype
    assert ids_T.device == out.device and table_VH.device in (out.device, HOST)
    check_range("ids_T", ids_T, 0, vocab)
    if num_tokens == 0:
        return out
    config = choose("embedding", family(out.device), tokens=num_tokens, hidden=hidden)
    _embedding_kernel[(num_tokens, cdiv(hidden, config["BLOCK_H"]))](
        ids_T,
        table_VH,
        out,
        ids_T.stride(0),
        table_VH.stride(0),
        out.stride(0),
        vocab,
        hidden,
        scale,
        HAS_SCALE=scale != 1.0,
        **config,
    )
    return out


def embedding_reference(ids_T: Tensor, table_VH: Tensor, *, scale: float = 1.0) -> Tensor:
    """The same in plain torch, computed and returned in float32; ids must be in range."""
    return table_VH[ids_T.long()].float() * scale


@triton.jit
def _embedding_kernel(
    ids_ptr,
    table_ptr,
    out_ptr,
    stride_ids,
    stride_table,
    stride_out,
    vocab,
    hidden,
    scale,
    HAS_SCALE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tl.load(ids_ptr + token * stride_ids).to(tl.int64)
    is_row = (row >= 0) & (row < vocab)
    mask_H = h_H < hidden
    row_ptr = table_ptr + tl.where(is_row, row, 0) * stride_table
    x_H = tl.load(row_ptr + h_H, mask=mask_H & is_row, other=float("nan"))
    if HAS_SCALE:
        x_H = x_H.to(tl.float32) * scale
    tl.store(out_ptr + token * stride_out + h_H, x_H.to(out_ptr.dtype.element_ty), mask=mask_H)

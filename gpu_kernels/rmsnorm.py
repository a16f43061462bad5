"""RMS norm of rows, alone or with the residual addition before it.

Computed in float32 and rounded once. Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import next_power_of_2


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x ** 2) + eps) * weight`` per row, in x's dtype.

    Rows may be strided (a slice of a fused projection); the last axis is contiguous.
    """
    out_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    _launch(x_TH, None, weight_H, eps, out_TH, None)
    return out_TH


def add_rms_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(sum), sum)`` with ``sum = x + residual`` rounded to x's dtype first."""
    assert residual_TH.shape == x_TH.shape and residual_TH.dtype == x_TH.dtype
    assert residual_TH.stride(1) == 1
    out_TH = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    sum_TH = torch.empty_like(out_TH)
    _launch(x_TH, residual_TH, weight_H, eps, out_TH, sum_TH)
    return out_TH, sum_TH


def rms_norm_reference(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """The same in plain torch, computed and returned in float32."""
    x_TH = x_TH.float()
    return x_TH * torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps) * weight_H.float()


def add_rms_norm_reference(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the norm in float32, the sum in x's dtype."""
    sum_TH = x_TH + residual_TH
    return rms_norm_reference(sum_TH, weight_H, eps), sum_TH


def _launch(
    x_TH: Tensor,
    residual_TH: Tensor | None,
    weight_H: Tensor,
    eps: float,
    out_TH: Tensor,
    sum_TH: Tensor | None,
) -> None:
    num_tokens, hidden = x_TH.shape
    assert x_TH.stride(1) == 1 and weight_H.shape == (hidden,) and weight_H.is_contiguous()
    assert x_TH.device == weight_H.device
    if num_tokens == 0:
        return
    block = next_power_of_2(hidden)
    _rms_norm_kernel[(num_tokens,)](
        x_TH,
        residual_TH,
        weight_H,
        out_TH,
        sum_TH,
        x_TH.stride(0),
        0 if residual_TH is None else residual_TH.stride(0),
        hidden,
        eps,
        BLOCK_H=block,
        HAS_RESIDUAL=residual_TH is not None,
        num_warps=min(max(block // 512, 1), 16),
    )


@triton.jit
def normed_row(x_H, weight_H, hidden, eps):
    """The norm of a row in float32, of which elements beyond ``hidden`` are 0."""
    scale = 1.0 / tl.sqrt(tl.sum(x_H * x_H, 0) / hidden + eps)
    return x_H * scale * weight_H


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    stride_x,
    stride_residual,
    hidden,
    eps,
    BLOCK_H: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    mask_H = h_H < hidden
    x_H = tl.load(x_ptr + token * stride_x + h_H, mask=mask_H, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_offset_H = token * stride_residual + h_H
        x_H += tl.load(residual_ptr + residual_offset_H, mask=mask_H, other=0.0).to(tl.float32)
        rounded_H = x_H.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * hidden + h_H, rounded_H, mask=mask_H)
        x_H = rounded_H.to(tl.float32)  # later layers see the rounded sum: norm the same values
    weight_H = tl.load(weight_ptr + h_H, mask=mask_H, other=0.0).to(tl.float32)
    out_H = normed_row(x_H, weight_H, hidden, eps)
    tl.store(out_ptr + token * hidden + h_H, out_H.to(out_ptr.dtype.element_ty), mask=mask_H)

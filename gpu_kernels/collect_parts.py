"""The parts of a layer, added up and normed in one launch: the end of handing work to the CPU.

Order of the sums, each float32 and none fused with a product: the parts as given, then the shared
expert's; that sum is rounded to the activations' type, the residual is added and the result rounded
again. The same kernel serves who has one part, so the ways to run a layer differ by nothing but
where the parts lie.

Shapes: T tokens (rows), H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.bell import wait_for
from gpu_kernels.dependent_launch import followed, let_next_start
from gpu_kernels.host_words import Bell
from gpu_kernels.paged_tile import FLOAT_DTYPES
from gpu_kernels.rmsnorm import normed_row
from gpu_kernels.whole_numbers import next_power_of_2

MAX_PARTS = 3


def collect(
    residual_TH: Tensor,
    parts: tuple[Tensor, ...],
    shared_TH: Tensor | None,
    norm_H: Tensor,
    eps: float,
    *,
    late: Bell | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(sum), sum)``, sum = residual + parts + shared expert's, in x's dtype.

    ``parts``: one to three float32 ``[T, H]``, on the device or in mapped host memory; see above
    for the order. ``late``: when the last of them is there. Safe in a CUDA graph.
    """
    num_tokens, hidden = residual_TH.shape
    assert 1 <= len(parts) <= MAX_PARTS
    for part_TH in parts:
        assert part_TH.shape == residual_TH.shape and part_TH.dtype == torch.float32
        assert part_TH.stride(1) == 1
    assert residual_TH.dtype in FLOAT_DTYPES and residual_TH.stride(1) == 1
    if shared_TH is not None:
        assert shared_TH.shape == residual_TH.shape and shared_TH.dtype == residual_TH.dtype
        assert shared_TH.stride(1) == 1 and shared_TH.device == residual_TH.device
    assert norm_H.shape == (hidden,) and norm_H.is_contiguous()
    assert norm_H.device == residual_TH.device
    normed_TH = torch.empty(residual_TH.shape, dtype=residual_TH.dtype, device=residual_TH.device)
    sum_TH = torch.empty_like(normed_TH)
    if num_tokens == 0:
        return normed_TH, sum_TH
    if late is not None:
        late.check()
    second_TH, third_TH = (*parts[1:], None, None)[:2]
    block = next_power_of_2(hidden)
    _collect_kernel[(num_tokens,)](
        residual_TH,
        parts[0],
        second_TH,
        third_TH,
        shared_TH,
        norm_H,
        normed_TH,
        sum_TH,
        *((None, 0) if late is None else (late.word, late.number)),
        residual_TH.stride(0),
        parts[0].stride(0),
        0 if second_TH is None else second_TH.stride(0),
        0 if third_TH is None else third_TH.stride(0),
        0 if shared_TH is None else shared_TH.stride(0),
        hidden,
        eps,
        BLOCK_H=block,
        HAS_SECOND=second_TH is not None,
        HAS_THIRD=third_TH is not None,
        HAS_SHARED=shared_TH is not None,
        **followed(residual_TH.device),
        num_warps=min(max(block // 512, 1), 16),
    )
    return normed_TH, sum_TH


def collect_reference(
    residual_TH: Tensor,
    parts: tuple[Tensor, ...],
    shared_TH: Tensor | None,
    norm_H: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the norm in float32, the sum in the residual's dtype."""
    device, dtype = residual_TH.device, residual_TH.dtype
    sum_TH = parts[0].to(device)
    for part_TH in parts[1:]:
        sum_TH = sum_TH + part_TH.to(device)
    if shared_TH is not None:
        sum_TH = sum_TH + shared_TH.float()
    sum_TH = residual_TH + sum_TH.to(dtype)
    x_TH = sum_TH.float()
    scale_T1 = torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps)
    return x_TH * scale_T1 * norm_H.float(), sum_TH


@triton.jit(do_not_specialize=["number"])
def _collect_kernel(
    residual_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    shared_ptr,
    norm_ptr,
    normed_ptr,
    sum_ptr,
    bell_ptr,
    number,
    stride_residual,
    stride_first,
    stride_second,
    stride_third,
    stride_shared,
    hidden,
    eps,
    BLOCK_H: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_THIRD: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    mask_H = h_H < hidden
    # the last part may be late: all else is loaded before
    residual_H = tl.load(residual_ptr + token * stride_residual + h_H, mask=mask_H, other=0.0)
    norm_H = tl.load(norm_ptr + h_H, mask=mask_H, other=0.0).to(tl.float32)
    if HAS_SHARED:
        shared_H = tl.load(shared_ptr + token * stride_shared + h_H, mask=mask_H, other=0.0)
    last_ptr = first_ptr + token * stride_first
    if HAS_SECOND:
        y_H = tl.load(last_ptr + h_H, mask=mask_H, other=0.0)
        last_ptr = second_ptr + token * stride_second
    if HAS_THIRD:
        y_H += tl.load(last_ptr + h_H, mask=mask_H, other=0.0)
        last_ptr = third_ptr + token * stride_third
    if bell_ptr is not None:
        last_ptr += 16 * wait_for(bell_ptr, number)
    last_H = tl.load(last_ptr + h_H, mask=mask_H, other=0.0)
    y_H = y_H + last_H if HAS_SECOND else last_H
    if HAS_SHARED:
        y_H += shared_H.to(tl.float32)
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    sum_H = (residual_H.to(tl.float32) + y_H.to(dtype).to(tl.float32)).to(dtype)
    tl.store(sum_ptr + token * hidden + h_H, sum_H, mask=mask_H)
    x_H = sum_H.to(tl.float32)  # later layers see the rounded sum: norm the same values
    normed_H = normed_row(x_H, norm_H, hidden, eps)
    tl.store(normed_ptr + token * hidden + h_H, normed_H.to(dtype), mask=mask_H)

"""SwiGLU's elementwise part: silu(gate) * up.

Computed in float32 and rounded once. Shapes: T rows, I expert width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.whole_numbers import cdiv

BLOCK_I = 1024


def silu_mul(gate_up_T2I: Tensor) -> Tensor:
    """Return ``silu(gate) * up`` as ``[T, I]``; the first half of each row is the gate."""
    num_tokens, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    assert gate_up_T2I.shape == (num_tokens, 2 * width) and gate_up_T2I.stride(1) == 1
    out_TI = gate_up_T2I.new_empty((num_tokens, width))
    if num_tokens > 0:
        grid = (num_tokens, cdiv(width, BLOCK_I))
        _silu_mul_kernel[grid](gate_up_T2I, out_TI, gate_up_T2I.stride(0), width, BLOCK_I=BLOCK_I)
    return out_TI


def silu_mul_reference(gate_up_T2I: Tensor) -> Tensor:
    """The same in plain torch, computed and returned in float32."""
    gate_TI, up_TI = gate_up_T2I.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate_TI) * up_TI


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, stride_row, width, BLOCK_I: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i_I = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_I = i_I < width
    gate_ptr = gate_up_ptr + row * stride_row
    gate_I = tl.load(gate_ptr + i_I, mask=mask_I, other=0.0).to(tl.float32)
    up_I = tl.load(gate_ptr + width + i_I, mask=mask_I, other=0.0).to(tl.float32)
    decay_I = tl.exp(-tl.abs(gate_I))  # never overflows: sigmoid from the small side
    sigmoid_I = tl.where(gate_I >= 0.0, 1.0, decay_I) / (1.0 + decay_I)
    out_I = gate_I * sigmoid_I * up_I
    tl.store(out_ptr + row * width + i_I, out_I.to(out_ptr.dtype.element_ty), mask=mask_I)

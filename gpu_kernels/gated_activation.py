"""What happens between an expert's two products: act = f(gate, up), in float32.

The same four functions as kernels of other devices use; sigmoids never overflow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.expert_weights import Activation


@triton.jit
def _sigmoid(x):
    decay = tl.exp(-tl.abs(x))  # at most 1: computed from the small side
    return tl.where(x >= 0.0, 1.0, decay) / (1.0 + decay)


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """f(gate, up) elementwise; ``ACTIVATION`` is an ``Activation``."""
    LIMIT: tl.constexpr = ACTIVATION.limit
    ALPHA: tl.constexpr = ACTIVATION.alpha
    if ACTIVATION.kind == "clamped_swiglu":
        # comparisons, not minimum and maximum: a NaN must stay one
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        result = gate * _sigmoid(ALPHA * gate) * (up + 1.0)
    elif ACTIVATION.kind == "gelu":
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION.kind == "gelu_tanh":
        # (1 + tanh(z)) / 2 is sigmoid(2 z); 1.5957691216057308 is 2 sqrt(2 / pi)
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        result = gate * _sigmoid(inner) * up
    else:
        tl.static_assert(ACTIVATION.kind == "silu")
        result = gate * _sigmoid(gate) * up
    return result


def activate_reference(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """The same in plain torch."""
    match activation.kind:
        case "clamped_swiglu":
            gate = gate.clamp(max=activation.limit)
            up = up.clamp(-activation.limit, activation.limit) + 1.0
            return gate * torch.sigmoid(activation.alpha * gate) * up
        case "gelu":
            return torch.nn.functional.gelu(gate) * up
        case "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        case "silu":
            return torch.nn.functional.silu(gate) * up

"""What happens between an expert's two products, in float64: act = f(gate, up)."""

import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from cpu_kernels.bf16 import F64

Activation = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]

# f(gate, c up) = c f(gate, up): clamping and an added one are not.
LINEAR_IN_UP: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh")

CLAMP_LIMIT = 7.0  # gpt-oss
CLAMP_ALPHA = 1.702  # gpt-oss: x * sigmoid(1.702 x) is close to gelu(x)


def silu(gate: F64, up: F64) -> F64:
    return gate * _sigmoid(gate) * up


def gelu(gate: F64, up: F64) -> F64:
    """The exact one, with erf."""
    values = [math.erf(value) for value in (gate / math.sqrt(2)).flat]
    erf: F64 = np.array(values).reshape(gate.shape)
    return 0.5 * gate * (1 + erf) * up


def gelu_tanh(gate: F64, up: F64) -> F64:
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    half: F64 = 0.5 * gate * (1 + np.tanh(inner))
    return half * up


def clamped_swiglu(gate: F64, up: F64) -> F64:
    """As in gpt-oss: gate is limited from above, up on both sides, and up counts from -1."""
    gate, up = np.minimum(gate, CLAMP_LIMIT), np.clip(up, -CLAMP_LIMIT, CLAMP_LIMIT)
    return gate * _sigmoid(CLAMP_ALPHA * gate) * (up + 1)


ACTIVATIONS: dict[Activation, Callable[[F64, F64], F64]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "clamped_swiglu": clamped_swiglu,
}


def _sigmoid(x: F64) -> F64:
    with np.errstate(over="ignore"):  # exp(-x) may be Inf: the sigmoid is then 0
        return 1 / (1 + np.exp(-x))

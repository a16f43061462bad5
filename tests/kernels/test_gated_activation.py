"""Activations of a gate and an up against the float64 definitions."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from paged_batch import DEVICE, frobenius_error

from cpu_kernels.activation_reference import ACTIVATIONS
from gpu_kernels.expert_weights import ACTIVATION_KINDS, Activation
from gpu_kernels.gated_activation import activate, activate_reference


@triton.jit
def activation_kernel(gate_ptr, up_ptr, out_ptr, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    place = tl.arange(0, SIZE)
    act = activate(tl.load(gate_ptr + place), tl.load(up_ptr + place), ACTIVATION)
    tl.store(out_ptr + place, act)


def run(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    out = torch.full_like(gate, float("nan"))
    activation_kernel[(1,)](gate, up, out, SIZE=len(gate), ACTIVATION=activation)
    return out


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_equals_float64(kind: str, size: float) -> None:
    gate, up = size * torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(ACTIVATIONS[kind](gate.double().numpy(), up.double().numpy()))  # type: ignore[index]
    gate, up = gate.to(DEVICE), up.to(DEVICE)
    activation = Activation(kind)  # type: ignore[arg-type]
    for actual in (run(gate, up, activation), activate_reference(gate, up, activation)):
        assert frobenius_error(actual.cpu(), expected) <= 1e-6


@pytest.mark.parametrize("kind", ACTIVATION_KINDS)
def test_extremes(kind: str) -> None:
    gate = torch.tensor([-1e5, -200.0, 0.0, 1e5, float("nan"), 1.0, -1e12, 1e12], device=DEVICE)
    up = torch.tensor([1.0, 1.0, 1e5, 1.0, 1.0, float("nan"), 1.0, 1.0], device=DEVICE)
    actual = run(gate, up, Activation(kind))  # type: ignore[arg-type]
    with np.errstate(over="ignore"):
        expected = ACTIVATIONS[kind](gate.double().cpu().numpy(), up.double().cpu().numpy())  # type: ignore[index]
    expected_2 = torch.from_numpy(expected).to(DEVICE, torch.float32)
    assert torch.allclose(actual, expected_2, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_limits_are_the_models_own() -> None:
    gate, up = torch.tensor([9.0, 9.0], device=DEVICE), torch.tensor([9.0, -9.0], device=DEVICE)
    activation = Activation("clamped_swiglu", limit=2.0, alpha=1.0)
    sigmoid = 1 / (1 + np.exp(-2.0))
    expected = torch.tensor([2 * sigmoid * 3, 2 * sigmoid * -1], device=DEVICE)
    for actual in (run(gate, up, activation), activate_reference(gate, up, activation)):
        assert torch.allclose(actual, expected.float(), rtol=1e-6)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(AssertionError):
        Activation("relu")  # type: ignore[arg-type]

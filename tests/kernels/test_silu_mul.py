"""silu(gate) * up against torch."""

import pytest
import torch
from paged_batch import DEVICE, frobenius_error
from torch import Tensor

from gpu_kernels.silu_mul import silu_mul, silu_mul_reference


def make_gate_up(num_tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rng = torch.Generator().manual_seed(width)
    return (4 * torch.randn(num_tokens, 2 * width, generator=rng)).to(DEVICE, dtype)


def torch_silu_mul(gate_up_T2I: Tensor) -> Tensor:
    width = gate_up_T2I.shape[1] // 2
    return torch.nn.functional.silu(gate_up_T2I[:, :width]) * gate_up_T2I[:, width:]


@pytest.mark.parametrize(("num_tokens", "width"), [(0, 8), (1, 1), (3, 100), (2, 1024), (2, 2500)])
def test_equals_torch(num_tokens: int, width: int) -> None:
    gate_up_T2I = make_gate_up(num_tokens, width)
    actual = silu_mul(gate_up_T2I)
    assert actual.shape == (num_tokens, width)
    if num_tokens:
        expected = torch_silu_mul(gate_up_T2I)
        assert frobenius_error(actual, expected) <= 1e-6
        assert frobenius_error(silu_mul_reference(gate_up_T2I), expected) <= 1e-6


def test_large_gates_saturate() -> None:
    gate_up_T2I = torch.tensor([[-1e4, 1e4, 2.0, 3.0]], device=DEVICE)
    assert silu_mul(gate_up_T2I).tolist() == [[0.0, 3e4]]


def test_rows_may_be_strided() -> None:
    gate_up_T2I = make_gate_up(3, 20)
    padded = torch.full((3, 64), float("nan"), device=DEVICE)
    padded[:, :40] = gate_up_T2I
    assert torch.equal(silu_mul(padded[:, :40]), silu_mul(gate_up_T2I))


def check_half_error(num_tokens: int, width: int, dtype: torch.dtype) -> None:
    """One rounding: no further from float32 than torch in the same dtype, which rounds twice."""
    gate_up_T2I = make_gate_up(num_tokens, width, dtype)
    exact = torch_silu_mul(gate_up_T2I.double())
    theirs = frobenius_error(torch_silu_mul(gate_up_T2I), exact)
    assert frobenius_error(silu_mul(gate_up_T2I), exact) <= theirs


def test_float16_rounds_once() -> None:
    check_half_error(5, 1100, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [768, 1408, 14336])
def test_half_dtypes_on_the_gpu(width: int, dtype: torch.dtype) -> None:
    check_half_error(513, width, dtype)


@pytest.mark.gpu
def test_float32_on_the_gpu() -> None:
    gate_up_T2I = make_gate_up(513, 14336)
    assert frobenius_error(silu_mul(gate_up_T2I), torch_silu_mul(gate_up_T2I)) <= 1e-6

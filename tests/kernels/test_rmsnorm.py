"""RMS norm against transformers', with and without the residual."""

import pytest
import torch
from paged_batch import DEVICE, frobenius_error, max_error
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

from gpu_kernels.rmsnorm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

EPS = 1e-5
SHAPES = [(0, 64), (1, 64), (3, 100), (5, 1), (2, 2048), (2, 3000)]


def make_rows(
    num_tokens: int, hidden: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(hidden)
    rows = torch.randn(2, num_tokens, hidden, generator=rng) * 3
    weight_H = 1 + 0.3 * torch.randn(hidden, generator=rng)
    x_TH, residual_TH = rows.to(DEVICE, dtype)
    return x_TH, residual_TH, weight_H.to(DEVICE, dtype)


def transformers_norm(x_TH: Tensor, weight_H: Tensor) -> Tensor:
    norm = MixtralRMSNorm(weight_H.shape[0], eps=EPS).to(DEVICE, weight_H.dtype)
    norm.weight.data.copy_(weight_H)
    return norm(x_TH).detach()


@pytest.mark.parametrize(("num_tokens", "hidden"), SHAPES)
def test_equals_transformers(num_tokens: int, hidden: int) -> None:
    x_TH, residual_TH, weight_H = make_rows(num_tokens, hidden)
    actual = rms_norm(x_TH, weight_H, EPS)
    assert actual.shape == x_TH.shape
    normed, summed = add_rms_norm(x_TH, residual_TH, weight_H, EPS)
    assert torch.equal(summed, x_TH + residual_TH)
    if num_tokens:
        assert max_error(actual, transformers_norm(x_TH, weight_H)) <= 1e-5
        assert max_error(normed, transformers_norm(x_TH + residual_TH, weight_H)) <= 1e-5


def test_rows_may_be_strided() -> None:
    x_TH, _, weight_H = make_rows(4, 48)
    fused = torch.full((4, 100), float("nan"), device=DEVICE)
    fused[:, 10:58] = x_TH
    assert torch.equal(rms_norm(fused[:, 10:58], weight_H, EPS), rms_norm(x_TH, weight_H, EPS))
    normed, summed = add_rms_norm(fused[:, 10:58], fused[:, 10:58], weight_H, EPS)
    assert torch.equal(summed, 2 * x_TH) and torch.isfinite(normed).all()


def test_zero_rows_stay_zero() -> None:
    weight_H = torch.ones(32, device=DEVICE)
    assert rms_norm(torch.zeros(2, 32, device=DEVICE), weight_H, EPS).eq(0).all()


def test_references_equal_transformers() -> None:
    x_TH, residual_TH, weight_H = make_rows(5, 96)
    expected = transformers_norm(x_TH, weight_H)
    assert max_error(rms_norm_reference(x_TH, weight_H, EPS), expected) <= 1e-5
    normed, summed = add_rms_norm_reference(x_TH, residual_TH, weight_H, EPS)
    assert torch.equal(summed, x_TH + residual_TH)
    assert max_error(normed, transformers_norm(summed, weight_H)) <= 1e-5


def check_half_error(num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    """One rounding: no further from float32 than transformers in the same dtype."""
    x_TH, residual_TH, weight_H = make_rows(num_tokens, hidden, dtype)
    normed, summed = add_rms_norm(x_TH, residual_TH, weight_H, EPS)
    assert torch.equal(summed, x_TH + residual_TH)
    for rows_TH, ours in ((x_TH, rms_norm(x_TH, weight_H, EPS)), (summed, normed)):
        exact = transformers_norm(rows_TH.float(), weight_H.float())
        theirs = transformers_norm(rows_TH, weight_H)
        assert frobenius_error(ours, exact) <= frobenius_error(theirs, exact)


def test_float16_rounds_once() -> None:
    check_half_error(7, 1024, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [128, 2048, 4096, 6144])
def test_half_dtypes_on_the_gpu(hidden: int, dtype: torch.dtype) -> None:
    check_half_error(513, hidden, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 2048, 6144])
def test_float32_on_the_gpu(hidden: int) -> None:
    x_TH, _, weight_H = make_rows(513, hidden)
    assert max_error(rms_norm(x_TH, weight_H, EPS), transformers_norm(x_TH, weight_H)) <= 1e-5

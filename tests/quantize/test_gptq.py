"""GPTQ against its definition (float64, an inverse for every column) and against rounding."""

import numpy as np
import pytest
import torch

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import Quantised, dequantise
from cpu_kernels.weight_kind import WeightKind, parse_kind
from fiddler.quantize.gptq import DAMPING, gptq, repairs
from fiddler.rounding.grid import find_grid
from fiddler.rounding.matrix import round_matrix


def correlated(num: int, cols: int, seed: int) -> torch.Tensor:
    """Inputs of which few directions carry most, as hidden states are."""
    generator = torch.Generator().manual_seed(7)
    mix_KK = torch.randn(cols, cols, generator=generator) / cols**0.5
    mix_KK = mix_KK * torch.randn(cols, generator=generator).exp()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, cols, generator=generator) @ mix_KK @ mix_KK


def normal(rows: int, cols: int) -> F32:
    return np.random.default_rng(0).standard_normal((rows, cols)).astype(np.float32)


def output_error(x_MK: torch.Tensor, w_NK: F32, found: Quantised, kind: WeightKind) -> float:
    difference = torch.from_numpy(dequantise(kind, *found) - w_NK)
    wanted_MN = x_MK @ torch.from_numpy(w_NK).T
    return float((x_MK @ difference.T).norm() / wanted_MN.norm())


def by_definition(w_NK: F32, hessian_KK: torch.Tensor, kind: WeightKind) -> F32:
    """Optimal brain surgery in float64: after each column H^-1 loses its row and column."""
    w_NK, cols = w_NK.astype(np.float64), w_NK.shape[1]
    h_KK = hessian_KK.double().numpy().copy()
    importance_K = np.diag(hessian_KK.numpy()).copy()
    h_KK += DAMPING[0] * np.diag(h_KK).mean() * np.eye(cols)
    inverse_KK = np.linalg.inv(h_KK)
    rounded_NK = np.empty_like(w_NK)
    for k in range(cols):
        if k % kind.group == 0:
            group = slice(k, k + kind.group)
            w_N1L = w_NK[:, None, group].astype(np.float32)
            grid = find_grid(w_N1L, kind, importance_K[group][None])
            scale_N, zero_N = (part[:, 0].astype(np.float64) for part in grid)
        codes_N = np.clip(np.rint(w_NK[:, k] / scale_N) + zero_N, 0, kind.max_code)
        rounded_NK[:, k] = (codes_N - zero_N) * scale_N
        error_N = (w_NK[:, k] - rounded_NK[:, k]) / inverse_KK[k, k]
        w_NK -= error_N[:, None] * inverse_KK[k]
        inverse_KK -= np.outer(inverse_KK[:, k], inverse_KK[k]) / inverse_KK[k, k]
    return rounded_NK.astype(np.float32)


@pytest.mark.parametrize("name", ["w4g32z", "w4g64", "w8g32"])
def test_it_is_the_definition(name: str) -> None:
    """But for weights halfway between two codes, which the last bits of a sum decide."""
    kind, w_NK, x_MK = parse_kind(name), normal(24, 128), correlated(1000, 128, 1)
    hessian_KK = x_MK.T @ x_MK
    found_NK = dequantise(kind, *gptq(w_NK, hessian_KK, kind))
    wanted_NK = by_definition(w_NK, hessian_KK, kind)
    is_same_NK = np.isclose(found_NK, wanted_NK, rtol=1e-4, atol=1e-6)
    assert is_same_NK.mean() > 0.99
    assert is_same_NK[:, : kind.group].mean() > 0.999  # before any difference could spread


def test_repairs_are_a_root_of_the_damped_inverse() -> None:
    x_MK = correlated(500, 64, 1)
    hessian_KK = (x_MK.T @ x_MK).double()
    upper_KK = repairs(hessian_KK.float()).double()
    assert torch.equal(upper_KK, upper_KK.triu())
    damped_KK = hessian_KK + DAMPING[0] * hessian_KK.diagonal().mean() * torch.eye(64)
    assert torch.allclose(upper_KK.T @ upper_KK @ damped_KK, torch.eye(64).double(), atol=1e-3)


@pytest.mark.parametrize("name", ["w4g128z", "w4g128", "w4g32z", "w8g128"])
def test_unseen_correlated_inputs_have_smaller_errors_than_by_rounding(name: str) -> None:
    kind, w_NK = parse_kind(name), normal(64, 256)
    seen_MK, unseen_MK = correlated(4000, 256, 1), correlated(1000, 256, 2)
    hessian_KK = seen_MK.T @ seen_MK
    importance_K = hessian_KK.diagonal().numpy().copy()
    ours = output_error(unseen_MK, w_NK, gptq(w_NK, hessian_KK, kind), kind)
    theirs = output_error(unseen_MK, w_NK, round_matrix(w_NK, kind, importance_K), kind)
    print(f"{name}: gptq {ours:.4f}, rounding {theirs:.4f}")
    assert ours < 0.8 * theirs


def test_independent_inputs_leave_nothing_to_repair() -> None:
    kind, w_NK = parse_kind("w4g64z"), normal(16, 128)
    found = gptq(w_NK, torch.eye(128), kind)
    for ours, theirs in zip(found, round_matrix(w_NK, kind), strict=True):
        assert ours is not None and theirs is not None and np.array_equal(ours, theirs)


@pytest.mark.parametrize("num_inputs", [0, 1, 5])
def test_a_hessian_that_is_not_positive_is_damped(num_inputs: int) -> None:
    kind, w_NK, x_MK = parse_kind("w4g32z"), normal(8, 64), correlated(num_inputs, 64, 1)
    found_NK = dequantise(kind, *gptq(w_NK, x_MK.T @ x_MK, kind))
    assert np.isfinite(found_NK).all()
    assert np.linalg.norm(found_NK - w_NK) < 0.3 * np.linalg.norm(w_NK)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    kind, w_NK, x_MK = parse_kind("w4g32z"), normal(8, 96), correlated(500, 96, 1)
    x_MK[:, 32:64] = 0
    found_NK = dequantise(kind, *gptq(w_NK, x_MK.T @ x_MK, kind))
    nearest_NK = dequantise(kind, *round_matrix(w_NK, kind))
    assert np.array_equal(found_NK[:, 32:64], nearest_NK[:, 32:64])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_without_a_number_are_refused(bad: float) -> None:
    hessian_KK = torch.eye(32)
    hessian_KK[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq(normal(4, 32), hessian_KK, parse_kind("w4g32"))

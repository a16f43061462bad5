"""Clip search against brute force over the same ranges, and its error bounds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import Quantised, decode_scales, dequantise, encode_scales
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import ROUNDED_KINDS, WeightKind, parse_kind
from fiddler.rounding.grid import SHRINKS
from fiddler.rounding.matrix import round_matrix


def normal(rows: int, cols: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def error(w_NK: F32, found: Quantised, kind: WeightKind) -> float:
    return float(np.linalg.norm(dequantise(kind, *found) - w_NK) / np.linalg.norm(w_NK))


@given(
    kind=st.sampled_from(ROUNDED_KINDS),
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    size=st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e4]),
)
def test_without_clipping_it_is_rounding_to_nearest(
    kind: WeightKind, seed: int, rows: int, groups: int, size: float
) -> None:
    w_NK = normal(rows, groups * kind.group, seed) * np.float32(size)
    w_NK[::3, : kind.group] = 0
    found, wanted = round_matrix(w_NK, kind, shrinks=(1.0,)), round_to_nearest(w_NK, kind)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or (np.array_equal(ours, theirs) and ours.dtype == theirs.dtype)


@pytest.mark.parametrize("name", ["w4g32z", "w4g64", "w8g128z-bf16", "w8g32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_chosen_range_is_the_best_of_all(name: str, weighted: bool) -> None:
    """One group by itself, every range tried in float64."""
    kind = parse_kind(name)
    rng = np.random.default_rng(1)
    for _ in range(20):
        w_L = rng.standard_t(3, kind.group).astype(np.float32)
        importance_L = rng.exponential(size=kind.group).astype(np.float32)
        counts_L = importance_L.astype(np.float64) if weighted else np.ones(kind.group)
        found = round_matrix(w_L[None], kind, importance_L if weighted else None)
        assert loss(w_L, found, kind, counts_L) <= 1.00001 * best_loss(w_L, kind, counts_L)


def loss(w_L: F32, found: Quantised, kind: WeightKind, counts_L: np.ndarray) -> float:
    return float((counts_L * (dequantise(kind, *found)[0].astype(np.float64) - w_L) ** 2).sum())


def best_loss(w_L: F32, kind: WeightKind, counts_L: np.ndarray) -> float:
    losses = []
    for shrink in SHRINKS:
        top, bottom = max(w_L.max(), 0) * shrink, min(w_L.min(), 0) * shrink
        if kind.has_zeros:
            scale = stored_up((top - bottom) / kind.max_code, kind)
            zero = round(-bottom / scale)
        else:
            scale = stored_up(max(top, -bottom) / kind.middle, kind)
            scale, zero = (-scale if top >= -bottom else scale), kind.middle
        codes_L = np.clip(np.rint(w_L.astype(np.float64) / scale) + zero, 0, kind.max_code)
        losses.append(float((counts_L * (scale * (codes_L - zero) - w_L) ** 2).sum()))
    return min(losses)


def stored_up(ideal: float, kind: WeightKind) -> float:
    bits = encode_scales(np.array([ideal]), kind.scales)
    if decode_scales(bits, kind.scales)[0] < ideal:
        bits = bits + np.uint16(1)
    return float(decode_scales(bits, kind.scales)[0])


def test_output_errors_of_normal_weights() -> None:
    w_NK, x_MK = normal(512, 1024), normal(64, 1024, 1)

    def output_error(found: F32) -> float:
        wanted = x_MK @ w_NK.T
        return float(np.linalg.norm(x_MK @ found.T - wanted) / np.linalg.norm(wanted))

    def of_kind(name: str) -> float:
        kind = parse_kind(name)
        return output_error(dequantise(kind, *round_matrix(w_NK, kind)))

    scale_N1 = np.abs(w_NK).max(axis=1, keepdims=True) / 7
    by_row = output_error(np.clip(np.rint(w_NK / scale_N1), -7, 7) * scale_N1)
    names = ("w4g128z", "w4g128", "w4g64z", "w4g32z", "w8g128z", "w8g128")
    print("; ".join(f"{name} {of_kind(name):.4f}" for name in names), f"; by row {by_row:.4f}")
    assert of_kind("w4g128z") <= 0.1 < by_row  # 0.095, 0.15
    assert of_kind("w4g32z") < of_kind("w4g64z") < of_kind("w4g128z")
    assert of_kind("w4g128") <= 0.11
    assert max(of_kind("w8g128"), of_kind("w8g128z")) <= 0.008


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, w_NK = parse_kind("w4g64z"), normal(37, 128)
    whole = round_matrix(w_NK, kind)
    monkeypatch.setattr("fiddler.rounding.matrix.CHUNK", 5 * 128)
    for ours, theirs in zip(round_matrix(w_NK, kind), whole, strict=True):
        assert ours is not None and theirs is not None and np.array_equal(ours, theirs)


def test_important_columns_round_better() -> None:
    kind, w_NK = parse_kind("w4g128"), normal(64, 128)
    importance_K = np.where(np.arange(128) < 16, np.float32(100), np.float32(1))
    plain, weighted = round_matrix(w_NK, kind), round_matrix(w_NK, kind, importance_K)
    first = slice(None), slice(0, 16)
    errors = [np.linalg.norm(dequantise(kind, *q)[first] - w_NK[first]) for q in (weighted, plain)]
    assert errors[0] < 0.95 * errors[1]


def test_weights_beyond_the_scales_type_are_refused() -> None:
    w_NK = np.full((1, 32), 1e6, np.float32)
    with pytest.raises(ValueError, match="too large for f16 scales: choose bf16"):
        round_matrix(w_NK, parse_kind("w4g32"))
    kind = parse_kind("w4g32-bf16")
    assert error(w_NK, round_matrix(w_NK, kind), kind) < 0.01

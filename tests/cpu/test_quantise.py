"""Rounding of weights and activations: bounds of the error, special groups, and the references."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.activation_reference import ACTIVATIONS
from cpu_kernels.packed_layout import MatrixShape, dequantise, pack_matrix
from cpu_kernels.packed_reference import (
    dense_layer_reference,
    packed_layer_reference,
    quantise_activations,
)
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import ROUNDED_KINDS, WeightKind, parse_kind

KIND_NAMES = [kind.name for kind in ROUNDED_KINDS]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


def restored(w_NK: np.ndarray, kind: WeightKind) -> np.ndarray:  # type: ignore[type-arg]
    return dequantise(kind, *round_to_nearest(w_NK, kind)).astype(np.float64)


def output_error(kind: WeightKind, rng: np.random.Generator) -> float:
    """Relative error of w @ x for normal weights and inputs."""
    w_NK = rng.standard_normal((256, 1024), np.float32)
    x_KT = rng.standard_normal((1024, 16))
    wrong = (restored(w_NK, kind) - w_NK) @ x_KT
    return float(np.linalg.norm(wrong) / np.linalg.norm(w_NK @ x_KT))


@pytest.mark.parametrize("name", KIND_NAMES)
def test_error_on_normal_weights(name: str, rng: np.random.Generator) -> None:
    kind = parse_kind(name)
    limit = {32: 0.09, 64: 0.1, 128: 0.11}[kind.group] if kind.bits == 4 else 0.008
    assert output_error(kind, rng) <= limit


def test_groups_are_better_than_one_scale_per_row(rng: np.random.Generator) -> None:
    w_NK = rng.standard_normal((64, 1024), np.float32)
    step_N1 = np.abs(w_NK).max(axis=1, keepdims=True) / 8
    by_row = np.linalg.norm(np.clip(np.rint(w_NK / step_N1), -8, 7) * step_N1 - w_NK)
    assert np.linalg.norm(restored(w_NK, parse_kind("w4g128")) - w_NK) < 0.9 * by_row


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(ROUNDED_KINDS),
    rows=st.integers(1, 20),
    cols=st.integers(1, 200),
    exponent=st.integers(-44, 4),
)
def test_no_weight_is_off_by_more_than_its_scale_allows(
    seed: int, kind: WeightKind, rows: int, cols: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    w_NK = rng.standard_t(3, (rows, cols)) * 10.0 ** (exponent + rng.integers(0, 3, (rows, cols)))
    w_NK = np.clip(w_NK, -4.5e5, 4.5e5).astype(np.float32)
    quantised = round_to_nearest(w_NK, kind)
    pack_matrix(kind, *quantised)  # refuses scales that are not of the kind's type
    weights_NK = dequantise(kind, *quantised).astype(np.float64)
    scale_NK = np.abs(np.repeat(quantised.scales_NG, kind.group, axis=1)[:, :cols], dtype=float)
    off_NK = np.abs(weights_NK - w_NK)
    is_clipped_NK = (quantised.codes_NK == kind.max_code) & (not kind.has_zeros)
    assert (off_NK <= np.where(is_clipped_NK, 1, 0.5) * scale_NK * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", KIND_NAMES)
def test_special_groups(name: str) -> None:
    kind = parse_kind(name)
    w_NK = np.zeros((6, 2 * kind.group), np.float32)
    w_NK[1] = 0.75  # constants
    w_NK[2] = -0.75
    w_NK[3] = 1e-7  # f16 scales of such groups are denormal
    w_NK[4, ::2] = 5e5
    w_NK[5, 5] = -3.0  # one weight alone
    quantised = round_to_nearest(w_NK, kind)
    weights_NK = dequantise(kind, *quantised)
    assert np.array_equal(weights_NK[0], w_NK[0]) and not quantised.scales_NG[0].any()
    assert np.allclose(weights_NK[[1, 2, 4, 5]], w_NK[[1, 2, 4, 5]], rtol=0.01)
    assert np.allclose(weights_NK[3], 1e-7, rtol=1 if kind.scales == "f16" else 0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w4g32", "w8g32z-bf16"])
def test_nan_and_inf_are_refused(name: str, bad: float) -> None:
    w_NK = np.zeros((3, 70), np.float32)
    w_NK[2, 69] = bad
    with pytest.raises(ValueError, match="NaN or Inf"):
        round_to_nearest(w_NK, parse_kind(name))


def test_weights_beyond_f16_scales_need_bf16() -> None:
    huge_NK = np.full((2, 32), 3e38, np.float32)
    huge_NK[1] = -3e38
    with pytest.raises(ValueError, match="choose bf16 scales"):
        round_to_nearest(huge_NK, parse_kind("w4g32"))
    for name in ("w4g32-bf16", "w8g32z-bf16"):
        assert np.allclose(restored(huge_NK, parse_kind(name)), huge_NK, rtol=0.01)


def test_padding_a_row_changes_no_code(rng: np.random.Generator) -> None:
    w_NK = rng.standard_normal((5, 100), np.float32)
    for kind in ROUNDED_KINDS:
        padded_NP = np.zeros((5, MatrixShape(kind, 5, 100).padded_cols), np.float32)
        padded_NP[:, :100] = w_NK
        short, full = round_to_nearest(w_NK, kind), round_to_nearest(padded_NP, kind)
        assert np.array_equal(short.codes_NK, full.codes_NK[:, :100])
        assert np.array_equal(short.scales_NG, full.scales_NG)


# --- activations ---


def plain_activation_group(x: list[np.float32]) -> tuple[list[int], np.float32]:
    """quantise_activations for one group, a number at a time."""
    if not all(math.isfinite(value) for value in x):
        return [0] * len(x), np.float32(np.nan)
    most = max(abs(value) for value in x)
    if most < 2.0**-118:
        return [0] * len(x), np.float32(0)
    inv = np.float32(127) / most
    codes = [round(float(value * inv)) for value in x]  # Python rounds half to even
    return codes, most * (np.float32(1) / np.float32(127))


@settings(max_examples=200)
@given(
    x=st.lists(st.floats(width=32), min_size=1, max_size=70),
    group=st.sampled_from([32, 64, 128]),
)
def test_activation_codes_to_the_bit(x: list[float], group: int) -> None:
    x_TK = np.array([x], np.float32)
    codes_TP, scales_TG = quantise_activations(x_TK, group)
    assert codes_TP.shape == (1, group * scales_TG.shape[1]) and scales_TG.dtype == np.float32
    for start in range(0, len(x), group):
        with np.errstate(over="ignore", under="ignore"):
            codes, scale = plain_activation_group(list(x_TK[0, start : start + group]))
        padded = codes + [0] * (group - len(codes))
        assert codes_TP[0, start : start + group].tolist() == padded
        assert np.array_equal(scales_TG[0, start // group], scale, equal_nan=True)


def test_activations_do_not_depend_on_flushed_denormals() -> None:
    x_TK = np.full((1, 32), 1.1754942e-38, np.float32)  # the largest denormal
    x_TK[0, 0] = 2.0**-118
    codes_TP, scales_TG = quantise_activations(x_TK, 32)
    assert codes_TP[0].tolist() == [127] + [0] * 31
    assert scales_TG[0, 0] >= np.finfo(np.float32).tiny


def test_activations_lose_half_a_step_at_most(rng: np.random.Generator) -> None:
    x_TK = (rng.standard_normal((40, 200)) * 10.0 ** rng.integers(-30, 30, (40, 1))).astype("f4")
    codes_TP, scales_TG = quantise_activations(x_TK, 64)
    scales_TK = np.repeat(scales_TG.astype(np.float64), 64, axis=1)[:, :200]
    off_TK = np.abs(codes_TP[:, :200] * scales_TK - x_TK)
    assert (off_TK <= 0.5001 * scales_TK).all()
    assert codes_TP.min() >= -127


# --- references of layers ---

Layer = tuple[np.ndarray, ...]  # type: ignore[type-arg]


@pytest.fixture
def layer(rng: np.random.Generator) -> Layer:
    """w13, w2, x, ids (some are -1, some repeat) and routing weights of 4 experts."""
    w13_EFH = rng.standard_normal((4, 2 * 21, 50)) / 7
    w2_EHI = rng.standard_normal((4, 50, 21)) / 5
    x_TH = rng.standard_normal((9, 50), np.float32)
    return w13_EFH, w2_EHI, x_TH, rng.integers(-1, 4, (9, 3)), rng.random((9, 3), np.float32)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_with_biases_one_token_at_a_time(
    layer: Layer, rng: np.random.Generator, activation: str
) -> None:
    w13_EFH, w2_EHI, x_TH, ids_TS, weights_TS = layer
    b13_EF, b2_EH = rng.standard_normal((4, 42)), rng.standard_normal((4, 50))
    options = {"activation": activation, "b13_EF": b13_EF, "b2_EH": b2_EH}
    found_TH = dense_layer_reference(*layer, **options)
    for token in range(9):
        expected_H = np.zeros(50)
        for expert, weight in zip(ids_TS[token], weights_TS[token], strict=True):
            if expert >= 0:
                both_F = w13_EFH[expert] @ x_TH[token] + b13_EF[expert]
                act_I = ACTIVATIONS[activation](both_F[:21], both_F[21:])  # type: ignore[index]
                expected_H += weight * (w2_EHI[expert] @ act_I + b2_EH[expert])
        assert np.allclose(found_TH[token], expected_H, rtol=1e-10)
    same_TH = packed_layer_reference(*layer, group=32, activations="f32", **options)
    assert np.array_equal(same_TH, found_TH)


def test_int8_activations_are_near_and_nan_comes_out(layer: Layer) -> None:
    exact_TH = dense_layer_reference(*layer)
    int8_TH = packed_layer_reference(*layer, group=32, activations="int8")
    assert 0 < np.abs(int8_TH - exact_TH).max() < 0.02 * np.abs(exact_TH).max()
    w13_EFH, w2_EHI, x_TH, ids_TS, weights_TS = layer
    spoilt_TH = x_TH.copy()
    spoilt_TH[4, 7] = np.inf
    ids_TS[4, 0] = 2
    out_TH = packed_layer_reference(
        w13_EFH, w2_EHI, spoilt_TH, ids_TS, weights_TS, group=32, activations="int8"
    )
    assert np.isnan(out_TH[4]).all() and np.isfinite(np.delete(out_TH, 4, axis=0)).all()


def test_activation_functions_at_known_points() -> None:
    one, up = np.array([1.0]), np.array([2.0])
    assert math.isclose(ACTIVATIONS["silu"](one, up)[0], 2 / (1 + math.exp(-1)))
    assert math.isclose(ACTIVATIONS["gelu"](one, up)[0], 2 * 0.8413447460685429)
    assert math.isclose(ACTIVATIONS["gelu_tanh"](one, up)[0], 2 * 0.8411919906082768)
    clamped = ACTIVATIONS["clamped_swiglu"]
    assert math.isclose(clamped(one, up)[0], 3 / (1 + math.exp(-1.702)))
    assert clamped(one * 90, up * -90)[0] == clamped(one * 7, one * -7)[0]
    assert clamped(one * -1000, up)[0] == 0

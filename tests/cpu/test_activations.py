"""exp and the activation functions as compiled, against float64."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels import activation_reference, activations
from cpu_kernels.activation_reference import CLAMP_ALPHA, CLAMP_LIMIT
from cpu_kernels.activations import CHUNK
from cpu_kernels.intrinsics import njit

F32 = npt.NDArray[np.float32]


exp_chunk = activations.make_chunk(
    lambda builder, gate, up, limit, alpha: activations.vector_exp(builder, gate)
)


@njit
def call_activate(kind, limit, alpha, gate, up, act):  # type: ignore[no-untyped-def]
    for at in range(0, 4 * len(act), 4 * CHUNK):
        addresses = (gate.ctypes.data + at, up.ctypes.data + at, act.ctypes.data + at)
        activations.activate(kind, limit, alpha, *addresses)


@pytest.mark.parametrize("name", activation_reference.ACTIVATIONS)
def test_those_called_linear_in_up_are(name: Any) -> None:
    """Experts' neurons may be scaled for them alone."""
    gate, up = np.random.default_rng(0).normal(size=(2, 100))
    function = activation_reference.ACTIVATIONS[name]
    is_linear = np.array_equal(function(gate, 4 * up), 4 * function(gate, up))
    assert is_linear == (name in activation_reference.LINEAR_IN_UP)


@njit
def call_exp(x, out):  # type: ignore[no-untyped-def]
    for at in range(0, 4 * len(out), 4 * CHUNK):
        address = x.ctypes.data + at
        exp_chunk(address, address, out.ctypes.data + at, np.float32(0), np.float32(0))


def whole_chunks(numbers: Any) -> F32:
    """``numbers`` as float32, zeros behind them up to a multiple of CHUNK."""
    numbers = np.asarray(numbers, np.float32)
    return np.pad(numbers, (0, -len(numbers) % CHUNK))


def exp(numbers: F32) -> F32:
    x = whole_chunks(numbers)
    out = np.empty_like(x)
    call_exp(x, out)
    return out[: len(numbers)]


def activate(name: str, gate: Any, up: Any, limit: float = 7.0, alpha: float = 1.702) -> F32:
    gate_c, up_c = whole_chunks(gate), whole_chunks(up)
    act = np.empty_like(gate_c)
    kind = activations.ACTIVATIONS.index(name)
    call_activate(kind, np.float32(limit), np.float32(alpha), gate_c, up_c, act)
    return act[: len(gate)]


def test_exp_is_accurate_to_some_units_of_float32() -> None:
    x = np.linspace(-87, 88, 1_000_001).astype(np.float32)
    near_zero = np.linspace(-1e-3, 1e-3, 10_001).astype(np.float32)
    for values in (x, near_zero):
        expected = np.exp(values.astype(np.float64))
        assert (np.abs(exp(values) - expected) < 3e-7 * expected).all()


def test_exp_of_zero_is_one_and_the_ends_are_limited() -> None:
    x = np.array([0, -0.0, -87, -88, -np.inf, 88, 89, np.inf], np.float32)
    one, also_one, least, *lesser, most, more, infinite = exp(x)
    assert one == also_one == 1
    assert all(value == least for value in lesser) and 0 < least < 1e-37
    assert most == more == infinite and 1e38 < most < np.inf


def test_numbers_are_the_same_on_both_sides() -> None:
    assert tuple(activation_reference.ACTIVATIONS) == activations.ACTIVATIONS


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_agrees_with_float64(name: str) -> None:
    """To 1e-6 of the larger of gate and the result: gelu cancels where the gate is negative."""
    rng = np.random.default_rng(20261121)
    for scale in (1e-3, 1, 5, 30):
        gate, up = scale * rng.standard_normal((2, 20_000), np.float32)
        exact = activation_reference.ACTIVATIONS[name](  # type: ignore[index]
            gate.astype(np.float64), up.astype(np.float64)
        )
        size = np.maximum(np.abs(gate) * (1 + np.abs(up)), np.abs(exact))
        assert (np.abs(activate(name, gate, up) - exact) <= 1e-6 * size).all()


@given(
    limit=st.floats(0.5, 20, width=32),
    alpha=st.floats(0.5, 3, width=32),
    gate=st.floats(-50, 50, width=32),
    up=st.floats(-50, 50, width=32),
)
def test_clamped_swiglu_for_any_limit(limit: float, alpha: float, gate: float, up: float) -> None:
    [found] = activate("clamped_swiglu", [gate], [up], limit, alpha)
    g, u = min(gate, limit), max(-limit, min(up, limit))
    exact = g / (1 + math.exp(-alpha * g)) * (u + 1)
    assert abs(found - exact) <= 2e-6 * max(abs(g), 1e-6) * (1 + abs(u))


def test_the_defaults_are_those_of_gpt_oss() -> None:
    assert (CLAMP_LIMIT, CLAMP_ALPHA) == (7.0, 1.702)


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_nan_is_never_swallowed(name: str) -> None:
    gate, up = np.meshgrid([np.nan, 0, 1, -1, 100, -100, np.inf], [np.nan, 0, 1, 100, -np.inf])
    act = activate(name, gate.ravel(), up.ravel())
    is_nan = np.isnan(gate.ravel()) | np.isnan(up.ravel())
    assert np.isnan(act[is_nan]).all()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_infinity_is_never_swallowed(name: str, bad: float) -> None:
    ones = np.ones(16, np.float32)
    assert not np.isfinite(activate(name, bad * ones, ones)).any()
    assert not np.isfinite(activate(name, ones, bad * ones)).any()


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_large_gates_do_not_overflow(name: str) -> None:
    gate = np.array([1e4, 1e15, 1e30, -1e4, -1e15, -1e30], np.float32)
    act = activate(name, gate, np.ones(6))
    expected = gate[:3]
    if name == "clamped_swiglu":
        expected = np.full(3, 7 / (1 + math.exp(-7 * CLAMP_ALPHA)) * 2)
    assert np.allclose(act[:3], expected, rtol=1e-6)
    assert (np.abs(act[3:]) < 1e-7).all()

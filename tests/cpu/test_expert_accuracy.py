"""The expert kernels against float64: every path, sizes, activations, biases.

Where the intermediate act is rounded to bf16 or int8, float64 and the kernel may round it to two
neighbours when it lies within 1e-6 between them. So those paths are proven in two steps: with w2
the identity the outputs are act as the kernel rounded it, and each is within half a step of the
float64 one; from that very act, outputs agree with float64 to 1e-5.
"""

import numpy as np
import pytest
from expert_layers import (
    BY_NAME,
    EXACT_PATHS,
    FEW_PATHS,
    PACKED_PATHS,
    ROUNDED_PATHS,
    TESTED_PATHS,
    TYPICAL_OUT,
    Rng,
    Step,
    Weights,
    add_layer,
    dense_weights,
    normal,
    packed_weights,
    random_matrix,
    random_mlp,
    random_step,
    random_weights,
    reference,
    relative_error,
    run,
    run_step,
    typical_size,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.activation_reference import ACTIVATIONS
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.expert_reference import bf16_to_f32, f32_to_bf16
from cpu_kernels.packed_layout import Quantised
from cpu_kernels.packed_reference import quantise_activations
from cpu_kernels.weight_kind import WeightKind

SIZES = [(1, 1), (1, 130), (130, 1), (3, 31), (31, 3), (33, 100), (100, 33), (128, 64), (259, 130)]
TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 512]


def tolerance(name: str) -> float:
    """End to end: where act is rounded, a few elements may be off by one code, 1/127 or 1/128."""
    return 1e-5 if name in EXACT_PATHS else 2e-3


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_agrees_with_float64_for_any_number_of_tokens(
    pool: ExpertPool, rng: Rng, name: str
) -> None:
    weights = random_weights(rng, name, hidden=130, width=67)
    layer = add_layer(pool, weights)
    for num_tokens in TOKENS:
        step = random_step(rng, num_tokens=num_tokens, hidden=130, num_experts=3)
        out_TH = run_step(pool, layer, step)
        assert out_TH.shape == (num_tokens, 130)
        assert relative_error(out_TH, reference(weights, step)) < tolerance(name), num_tokens
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", TESTED_PATHS)
@pytest.mark.parametrize(("hidden", "width"), SIZES)
def test_agrees_with_float64_for_odd_sizes(
    pool: ExpertPool, rng: Rng, name: str, hidden: int, width: int
) -> None:
    weights = random_weights(rng, name, hidden=hidden, width=width)
    step = random_step(rng, num_tokens=11, hidden=hidden, num_experts=3, top_k=3)
    error = relative_error(run(pool, weights, step), reference(weights, step), typical_size(step))
    assert error < tolerance(name)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    name=st.sampled_from(TESTED_PATHS),
    activation=st.sampled_from(list(ACTIVATIONS)),
    has_biases=st.booleans(),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 150), st.integers(1, 150)),
    num_tokens=st.integers(0, 70),
    top_k=st.integers(1, 5),
)
def test_agrees_with_float64_for_any_layer(
    pool: ExpertPool,
    seed: int,
    name: str,
    activation: str,
    has_biases: bool,
    sizes: tuple[int, int, int],
    num_tokens: int,
    top_k: int,
) -> None:
    rng = np.random.default_rng(seed)
    num_experts, hidden, width = sizes
    mlp = random_mlp(rng, activation, *sizes) if has_biases else None
    weights = random_weights(
        rng, name, num_experts=num_experts, hidden=hidden, width=width, mlp=mlp
    )
    step = random_step(
        rng, num_tokens=num_tokens, hidden=hidden, num_experts=num_experts, top_k=top_k
    )
    error = relative_error(run(pool, weights, step), reference(weights, step), typical_size(step))
    # One element of act off by one code weighs more in a narrow layer than in those above; one
    # that is left out of a sum of 150 weighs 8e-2.
    assert error < (1e-5 if name in EXACT_PATHS else 2e-2)


@pytest.mark.parametrize("name", FEW_PATHS)
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(
    pool: ExpertPool, rng: Rng, name: str, activation: str, has_biases: bool
) -> None:
    mlp = random_mlp(rng, activation, 3, 100, 70)
    if has_biases:
        assert mlp.b13_EF is not None
        mlp.b13_EF[:, ::5] *= 10  # some beyond the limits of a clamped activation
    else:
        mlp = type(mlp)(activation=mlp.activation)
    weights = random_weights(rng, name, hidden=100, width=70, mlp=mlp)
    step = random_step(rng, num_tokens=13, hidden=100, num_experts=3)
    assert relative_error(run(pool, weights, step), reference(weights, step)) < tolerance(name)


def test_long_sums_keep_their_accuracy(pool: ExpertPool, rng: Rng) -> None:
    for name in ("bf16/f32", "w4g128-bf16/f32"):
        weights = random_weights(rng, name, num_experts=1, hidden=64, width=14336)
        step = random_step(rng, num_tokens=3, hidden=64, num_experts=1)
        assert relative_error(run(pool, weights, step), reference(weights, step)) < 1e-5


def test_bf16_weights_are_read_exactly(pool: ExpertPool, rng: Rng) -> None:
    weights = random_weights(rng, "bf16/f32", hidden=70, width=30)
    as_f32 = dense_weights(
        BY_NAME["f32/f32"],
        weights.w13_EFH.astype(np.float32),
        weights.w2_EHI.astype(np.float32),
    )
    step = random_step(rng, num_tokens=9, hidden=70, num_experts=3)
    assert np.array_equal(run(pool, weights, step), run(pool, as_f32, step))


def test_rounding_to_bf16_costs_little(pool: ExpertPool, rng: Rng) -> None:
    """The bound is one rounding's: half a step of bf16 is 2**-8 of a number at most."""
    weights = random_weights(rng, "bf16/bf16", hidden=256, width=96)
    step = random_step(rng, num_tokens=33, hidden=256, num_experts=3)
    unrounded_TH = reference(weights, step, "f32")
    assert 1e-4 < relative_error(run(pool, weights, step), unrounded_TH) < 4e-3


def identity(kind: WeightKind, size: int) -> Quantised:
    """As codes: scale 1, the zero point of the others and one more."""
    groups = -(-size // kind.group)
    codes_NK = np.full((size, size), kind.middle, np.uint8) + np.eye(size, dtype=np.uint8)
    zeros_NG = np.full((size, groups), kind.middle, np.uint8) if kind.has_zeros else None
    return Quantised(codes_NK, np.ones((size, groups), np.float32), zeros_NG)


def with_and_without_down(rng: Rng, name: str, size: int) -> tuple[Weights, Weights]:
    """One expert [size, size, size] with random w2, and with the identity in its place."""
    path = BY_NAME[name]
    if not path.kind.is_packed:
        w13_EFH = normal(rng, 1, 2 * size, size) / np.float32(size**0.5)
        w2_EHI = normal(rng, 1, size, size) / np.float32(size**0.5)
        eye_EHI = np.eye(size, dtype=np.float32)[None]
        return dense_weights(path, w13_EFH, w2_EHI), dense_weights(path, w13_EFH, eye_EHI)
    halves = (random_matrix(rng, path.kind, size, size) for _ in range(2))
    gate_up = tuple(halves)
    downs = (random_matrix(rng, path.kind, size, size), identity(path.kind, size))
    both = (packed_weights(path, [(*gate_up, down)], size, size) for down in downs)
    with_down, without = both
    return with_down, without


def one_expert_step(x_TH: np.ndarray) -> Step:  # type: ignore[type-arg]
    ids_TS = np.zeros((len(x_TH), 1), np.int32)
    return Step(x_TH=x_TH, ids_TS=ids_TS, weights_TS=np.ones((len(x_TH), 1), np.float32))


def rounded(name: str, x_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """Hidden states as a path's products read them, float64; and half a step for each."""
    if name.endswith("/bf16"):
        near_TK = bf16_to_f32(f32_to_bf16(x_TK)).astype(np.float64)
        return near_TK, 2.0**-8 * np.abs(x_TK)
    group = BY_NAME[name].kind.group
    codes_TP, scales_TG = quantise_activations(x_TK.astype(np.float32), group)
    scales_TP = np.repeat(scales_TG.astype(np.float64), group, axis=1)
    cols = x_TK.shape[1]
    return (codes_TP * scales_TP)[:, :cols], scales_TP[:, :cols] / 2


@pytest.mark.parametrize("name", ROUNDED_PATHS)
@pytest.mark.parametrize("num_tokens", [1, 4, 21])
@pytest.mark.parametrize("size", [33, 128, 300])
def test_rounded_activations_step_by_step(
    pool: ExpertPool, rng: Rng, name: str, num_tokens: int, size: int
) -> None:
    weights, without_down = with_and_without_down(rng, name, size)
    step = one_expert_step(normal(rng, num_tokens, size))
    act_TI = run(pool, without_down, step).astype(np.float64)
    near_TH, half_step_TH = rounded(name, step.x_TH)
    gate_TI, up_TI = np.split(near_TH @ weights.w13_EFH[0].T, 2, axis=1)
    exact_TI = ACTIVATIONS["silu"](gate_TI, up_TI)
    _, half_step_TI = rounded(name, exact_TI)
    slack = 1e-5 * np.sqrt(np.mean(exact_TI**2))
    assert (np.abs(act_TI - exact_TI) <= half_step_TI * (1 + 1e-5) + slack).all()
    # These are numbers that the rounding has: rounded once more, they stay.
    assert np.allclose(rounded(name, act_TI)[0], act_TI, rtol=1e-6, atol=0)
    expected_TH = act_TI @ weights.w2_EHI[0].T
    assert relative_error(run(pool, weights, step), expected_TH) < 1e-5

    # And what rounding x does to act is within what half a step of each x can do: silu is no
    # steeper than 1.1, and |silu(g)| <= |g|.
    gate_TI, up_TI = np.split(step.x_TH.astype(np.float64) @ weights.w13_EFH[0].T, 2, axis=1)
    off_gate_TI, off_up_TI = np.split(half_step_TH @ np.abs(weights.w13_EFH[0]).T, 2, axis=1)
    unrounded_TI = ACTIVATIONS["silu"](gate_TI, up_TI)
    bound_TI = 1.1 * off_gate_TI * (np.abs(up_TI) + off_up_TI) + np.abs(gate_TI) * off_up_TI
    assert (np.abs(act_TI - unrounded_TI) <= bound_TI + half_step_TI * (1 + 1e-5) + slack).all()


@pytest.mark.parametrize("name", [name for name in PACKED_PATHS if name.endswith("/int8")])
def test_int8_error_is_within_half_a_step_of_each_element(
    pool: ExpertPool, rng: Rng, name: str
) -> None:
    """x is whole numbers up to 127 in each group: int8 has it, so act alone is rounded."""
    size, group = 160, BY_NAME[name].kind.group
    weights, _ = with_and_without_down(rng, name, size)
    x_TH = rng.integers(-126, 127, (9, size)).astype(np.float32)
    x_TH[:, ::group] = 127
    step = one_expert_step(x_TH / np.float32(128))
    gate_TI, up_TI = np.split(step.x_TH @ weights.w13_EFH[0].T, 2, axis=1)
    _, half_step_TI = rounded(name, ACTIVATIONS["silu"](gate_TI, up_TI))
    bound_TH = half_step_TI @ np.abs(weights.w2_EHI[0]).T
    wrong_TH = np.abs(run(pool, weights, step) - reference(weights, step, "f32"))
    assert (wrong_TH <= bound_TH + 1e-5 * TYPICAL_OUT).all()
    assert wrong_TH.max() > 1e-4 * TYPICAL_OUT  # it does round

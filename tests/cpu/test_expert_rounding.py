"""Activations rounded to bf16 or int8: the kernels round as they say, and all else is exact.

Where the intermediate act is rounded to bf16 or int8, float64 and the kernel may round it to two
neighbours when it lies within 1e-6 between them. So those paths are proven in two steps: with w2
the identity the outputs are act as the kernel rounded it, and each is within half a step of the
float64 one; from that very act, outputs agree with float64 to 1e-5.
"""

import numpy as np
import pytest
from expert_layers import (
    BY_NAME,
    F32,
    F64,
    PACKED_PATHS,
    ROUNDED_PATHS,
    TYPICAL_OUT,
    Rng,
    Step,
    Weights,
    dense_weights,
    lossless_weights,
    normal,
    packed_weights,
    random_matrix,
    random_step,
    random_weights,
    reference,
    relative_error,
    run,
)

from cpu_kernels.activation_reference import ACTIVATIONS
from cpu_kernels.bf16 import bf16_to_f32, f32_to_bf16
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.kernel_paths import KernelPath
from cpu_kernels.packed_layout import Quantised
from cpu_kernels.packed_reference import quantise_activations
from cpu_kernels.weight_kind import WeightKind


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


def lossless_from_floats(path: KernelPath, w13_EFH: F32, w2_EHI: F32) -> Weights:
    """Of one expert."""
    gate_IH, up_IH = np.split(f32_to_bf16(w13_EFH[0]), 2)
    matrices = [(gate_IH, up_IH, f32_to_bf16(w2_EHI[0]))]
    return lossless_weights(path, matrices, w2_EHI.shape[1], w2_EHI.shape[2])


def with_and_without_down(rng: Rng, name: str, size: int) -> tuple[Weights, Weights]:
    """One expert [size, size, size] with random w2, and with the identity in its place."""
    path = BY_NAME[name]
    if not path.kind.is_rounded:
        w13_EFH = normal(rng, 1, 2 * size, size) / np.float32(size**0.5)
        w2_EHI = normal(rng, 1, size, size) / np.float32(size**0.5)
        eye_EHI = np.eye(size, dtype=np.float32)[None]
        make = lossless_from_floats if path.kind.is_lossless else dense_weights
        return make(path, w13_EFH, w2_EHI), make(path, w13_EFH, eye_EHI)
    gate, up, down = (random_matrix(rng, path.kind, size, size) for _ in range(3))
    with_down = packed_weights(path, [(gate, up, down)], size, size)
    return with_down, packed_weights(path, [(gate, up, identity(path.kind, size))], size, size)


def one_expert_step(x_TH: F32) -> Step:
    ids_TS = np.zeros((len(x_TH), 1), np.int32)
    return Step(x_TH=x_TH, ids_TS=ids_TS, weights_TS=np.ones((len(x_TH), 1), np.float32))


def rounded(name: str, x_TK: F32 | F64) -> tuple[F64, F64]:
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
    near_TH, _ = rounded(name, step.x_TH)
    gate_TI, up_TI = np.split(near_TH @ weights.w13_EFH[0].T, 2, axis=1)
    exact_TI = ACTIVATIONS["silu"](gate_TI, up_TI)
    _, half_step_TI = rounded(name, exact_TI)
    slack = 1e-5 * np.sqrt(np.mean(exact_TI**2))
    assert (np.abs(act_TI - exact_TI) <= half_step_TI * (1 + 1e-5) + slack).all()
    # These are numbers that the rounding has: rounded once more, they stay.
    assert np.allclose(rounded(name, act_TI)[0], act_TI, rtol=1e-6, atol=0)
    expected_TH = act_TI @ weights.w2_EHI[0].T
    assert relative_error(run(pool, weights, step), expected_TH) < 1e-5


@pytest.mark.parametrize("name", ROUNDED_PATHS)
def test_rounding_x_moves_act_by_half_steps_at_most(pool: ExpertPool, rng: Rng, name: str) -> None:
    """Of each x; and then there is act's own half step. Silu is no steeper than 1.1."""
    weights, without_down = with_and_without_down(rng, name, 160)
    step = one_expert_step(normal(rng, 9, 160))
    _, half_step_TH = rounded(name, step.x_TH)
    w13_FH = weights.w13_EFH[0]
    gate_TI, up_TI = np.split(step.x_TH.astype(np.float64) @ w13_FH.T, 2, axis=1)
    off_gate_TI, off_up_TI = np.split(half_step_TH @ np.abs(w13_FH).T, 2, axis=1)
    exact_TI = ACTIVATIONS["silu"](gate_TI, up_TI)
    bound_TI = 1.1 * off_gate_TI * (np.abs(up_TI) + off_up_TI) + np.abs(gate_TI) * off_up_TI
    _, half_step_TI = rounded(name, np.abs(exact_TI) + bound_TI)
    wrong_TI = np.abs(run(pool, without_down, step) - exact_TI)
    assert (wrong_TI <= bound_TI + half_step_TI + 1e-5 * TYPICAL_OUT).all()


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

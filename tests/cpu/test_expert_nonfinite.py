"""NaN, Inf and denormals: a broken number comes out in its own rows and nowhere else."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from expert_layers import (
    BY_NAME,
    DENSE_PATHS,
    FEW_PATHS,
    TESTED_PATHS,
    Rng,
    Step,
    Weights,
    add_layer,
    changed,
    dense_weights,
    random_mlp,
    random_step,
    random_weights,
    run,
    run_step,
)

from cpu_kernels.activation_reference import ACTIVATIONS
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Mlp

BAD = [np.nan, np.inf, -np.inf]
HIDDEN, WIDTH = 100, 70


def one_choice_step(rng: Rng, num_tokens: int = 12) -> Step:
    """Token t has expert t modulo 3."""
    step = random_step(rng, num_tokens=num_tokens, hidden=HIDDEN, num_experts=3, top_k=1)
    ids_TS = (np.arange(num_tokens, dtype=np.int32) % 3)[:, None]
    return changed(step, ids_TS=ids_TS)


def check(out_TH: Any, clean_TH: Any, is_hit_T: npt.NDArray[np.bool_]) -> None:
    """All of the hit rows is broken, the others have the bits that they had."""
    assert np.isfinite(clean_TH).all()
    assert not np.isfinite(out_TH[is_hit_T]).any()
    assert np.array_equal(out_TH[~is_hit_T], clean_TH[~is_hit_T])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FEW_PATHS)
def test_in_x(pool: ExpertPool, rng: Rng, name: str, activation: Any, bad: float) -> None:
    mlp = random_mlp(rng, activation, 3, HIDDEN, WIDTH)
    weights = random_weights(rng, name, hidden=HIDDEN, width=WIDTH, mlp=mlp)
    step = one_choice_step(rng)
    clean_TH = run(pool, weights, step)
    layer = add_layer(pool, weights)
    for column in (0, 64, HIDDEN - 1):
        x_TH = step.x_TH.copy()
        x_TH[4, column] = x_TH[9, column] = bad
        out_TH = run_step(pool, layer, changed(step, x_TH=x_TH))
        check(out_TH, clean_TH, np.isin(np.arange(12), (4, 9)))
        if name.endswith("/int8"):
            assert np.isnan(out_TH[[4, 9]]).all()
    assert np.array_equal(run_step(pool, layer, step), clean_TH)  # nothing stays in the scratch
    pool.remove_layer(layer)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", TESTED_PATHS)
def test_in_routing_weights(pool: ExpertPool, rng: Rng, name: str, bad: float) -> None:
    weights = random_weights(rng, name, hidden=HIDDEN, width=WIDTH)
    step = one_choice_step(rng)
    clean_TH = run(pool, weights, step)
    weights_TS = step.weights_TS.copy()
    weights_TS[7] = bad
    out_TH = run(pool, weights, changed(step, weights_TS=weights_TS))
    check(out_TH, clean_TH, np.arange(12) == 7)


def test_routing_weights_of_no_choice_do_not_count(pool: ExpertPool, rng: Rng) -> None:
    weights = random_weights(rng, "bf16/f32", hidden=HIDDEN, width=WIDTH)
    step = random_step(rng, num_tokens=12, hidden=HIDDEN, num_experts=3)
    clean_TH = run(pool, weights, step)
    weights_TS = np.where(step.ids_TS < 0, np.float32(np.nan), step.weights_TS)
    out_TH = run(pool, weights, changed(step, weights_TS=weights_TS))
    assert np.array_equal(out_TH, clean_TH)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", DENSE_PATHS)
def test_in_weights(pool: ExpertPool, rng: Rng, name: str, activation: Any, bad: float) -> None:
    mlp = Mlp(activation=activation)
    good = random_weights(rng, name, hidden=HIDDEN, width=WIDTH, mlp=mlp)
    step = one_choice_step(rng)
    x_TH = np.abs(step.x_TH)  # signs are known: see the rows below
    step = changed(step, x_TH=x_TH)
    clean_TH = run(pool, good, step)
    is_hit_T = np.arange(12) % 3 == 1
    # The clamped gate is min(gate, limit): +Inf is a number to it, and up is limited both ways.
    rows = [3, WIDTH + 3]
    if activation == "clamped_swiglu":
        rows = [] if np.isinf(bad) and bad > 0 else [3] if np.isinf(bad) else rows
    for row in rows:
        w13_EFH = good.w13_EFH.astype(np.float32)
        w13_EFH[1, row, 5] = bad
        broken = dense_weights(BY_NAME[name], w13_EFH, good.w2_EHI.astype(np.float32), mlp)
        check(run(pool, broken, step), clean_TH, is_hit_T)
    w2_EHI = good.w2_EHI.astype(np.float32)
    w2_EHI[1, 8, 2] = bad
    broken = dense_weights(BY_NAME[name], good.w13_EFH.astype(np.float32), w2_EHI, mlp)
    out_TH = run(pool, broken, step)
    check(out_TH[:, 8:9], clean_TH[:, 8:9], is_hit_T)
    assert np.array_equal(np.delete(out_TH, 8, axis=1), np.delete(clean_TH, 8, axis=1))


@pytest.mark.parametrize("which", ["b13_EF", "b2_EH"])
@pytest.mark.parametrize("name", FEW_PATHS)
def test_nan_in_biases(pool: ExpertPool, rng: Rng, name: str, which: str) -> None:
    for activation in ACTIVATIONS:
        mlp = random_mlp(rng, activation, 3, HIDDEN, WIDTH)
        weights = random_weights(rng, name, hidden=HIDDEN, width=WIDTH, mlp=mlp)
        step = one_choice_step(rng)
        clean_TH = run(pool, weights, step)
        bias = getattr(mlp, which)
        bias[1] = np.nan
        check(run(pool, weights, step), clean_TH, np.arange(12) % 3 == 1)


@pytest.mark.parametrize("name", DENSE_PATHS)
def test_experts_without_tokens_are_not_looked_at(pool: ExpertPool, rng: Rng, name: str) -> None:
    good = random_weights(rng, name, hidden=HIDDEN, width=WIDTH)
    w13_EFH, w2_EHI = good.w13_EFH.astype(np.float32), good.w2_EHI.astype(np.float32)
    w13_EFH[1], w2_EHI[1] = np.nan, np.nan
    broken = dense_weights(BY_NAME[name], w13_EFH, w2_EHI)
    step = one_choice_step(rng)
    step = changed(step, ids_TS=np.where(step.ids_TS == 1, np.int32(2), step.ids_TS))
    assert np.array_equal(run(pool, broken, step), run(pool, good, step))


def tiny_down(weights: Weights) -> Weights:
    w2_EHI = np.full(weights.w2_EHI.shape, 1e-40, np.float32)
    return dense_weights(weights.path, weights.w13_EFH.astype(np.float32), w2_EHI)


@pytest.mark.parametrize("name", DENSE_PATHS)
@pytest.mark.parametrize("num_tokens", [1, 12])
def test_denormal_weights_count_as_zero(
    pool: ExpertPool, rng: Rng, name: str, num_tokens: int
) -> None:
    weights = tiny_down(random_weights(rng, name, hidden=HIDDEN, width=WIDTH))
    assert (weights.w2_EHI > 0).all()
    step = one_choice_step(rng, num_tokens)
    huge = changed(step, weights_TS=np.full_like(step.weights_TS, 1e38))
    assert np.array_equal(run(pool, weights, huge), np.zeros_like(step.x_TH))


@pytest.mark.parametrize("name", FEW_PATHS)
def test_denormal_x_counts_as_zero(pool: ExpertPool, rng: Rng, name: str) -> None:
    weights = random_weights(rng, name, hidden=HIDDEN, width=WIDTH)
    step = one_choice_step(rng)
    tiny = changed(step, x_TH=np.full_like(step.x_TH, 1e-40))
    assert np.array_equal(run(pool, weights, tiny), np.zeros_like(step.x_TH))


@pytest.mark.parametrize("caller_works", [False, True])
def test_the_caller_keeps_its_denormals(rng: Rng, caller_works: bool) -> None:
    weights = random_weights(rng, "f32/f32", hidden=HIDDEN, width=WIDTH)
    step = one_choice_step(rng)
    with ExpertPool(2, caller_works=caller_works) as pool:
        layer = add_layer(pool, weights)
        run_step(pool, layer, step)
        pool.submit(layer, *step.arrays(), np.empty_like(step.x_TH))
        assert is_denormal_kept()
        pool.wait()
        assert is_denormal_kept()


def is_denormal_kept() -> bool:
    tiny = np.full(64, 1e-40, np.float32)
    return bool((tiny * np.float32(0.5) > 0).all() and (tiny + tiny > tiny).all())

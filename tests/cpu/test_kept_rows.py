"""Layers of which only the first rows are computed: those of a narrower layer, whoever adds others.

T tokens, E experts, H hidden, I width, F = 2I, N numbers of routed experts.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from expert_layers import (
    F32,
    FEW_PATHS,
    TESTED_PATHS,
    Rng,
    Step,
    Weights,
    add_layer,
    random_mlp,
    random_step,
    random_weights,
    reference,
    relative_error,
    run_step,
)

from cpu_kernels.expert_layer import ExpertLayer
from cpu_kernels.expert_pool import ExpertPool

E, HIDDEN, WIDTH = 5, 200, 330  # the last group of a packed kind is not full
UNIT = 128  # a multiple of every group
KEPT = (0, 128, 256, WIDTH)
I32 = npt.NDArray[np.int32]


def run_kept(pool: ExpertPool, layer: ExpertLayer, step: Step, kept_N: I32) -> F32:
    """As ``run_step``, by the bell alone."""
    out_TH = np.full_like(step.x_TH, np.nan)
    pool.bind(layer, *step.arrays(), out_TH, kept_N)
    pool.workers.ring(layer.number)
    pool.wait()
    return out_TH


def narrow(weights: Weights, kept: int) -> Weights:
    """The first rows of gate and up and columns of w2, for the reference."""
    mlp, width = weights.experts.mlp, weights.w2_EHI.shape[2]
    rows_F = [*range(kept), *range(width, width + kept)]
    if mlp.b13_EF is not None:
        mlp = replace(mlp, b13_EF=np.ascontiguousarray(mlp.b13_EF[:, rows_F]))
    return replace(
        weights,
        experts=replace(weights.experts, mlp=mlp),
        w13_EFH=weights.w13_EFH[:, rows_F],
        w2_EHI=weights.w2_EHI[:, :, :kept],
    )


def table(kept: int) -> I32:
    return np.full(E + 1, kept, np.int32)


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_agrees_with_float64_for_any_kept_width(pool: ExpertPool, rng: Rng, name: str) -> None:
    weights = random_weights(rng, name, num_experts=E, hidden=HIDDEN, width=WIDTH)
    layer = add_layer(pool, weights)
    for num_tokens in (1, 2, 3, 5, 8, 12, 13, 16, 17, 32):
        step = random_step(rng, num_tokens=num_tokens, hidden=HIDDEN, num_experts=E)
        whole_TH = run_step(pool, layer, step)
        for kept in KEPT:
            out_TH = run_kept(pool, layer, step, table(kept))
            if kept == 0:
                assert not out_TH.any()
            elif kept == WIDTH:
                assert np.array_equal(out_TH, whole_TH)
            else:  # an element of act may have a neighbouring code where it is rounded
                error = relative_error(out_TH, reference(narrow(weights, kept), step))
                assert error < (1e-5 if name.endswith("/f32") else 2e-3), (num_tokens, kept)
        assert np.array_equal(run_step(pool, layer, step), whole_TH)  # no table stays behind
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", FEW_PATHS)
def test_the_number_of_routed_experts_chooses(pool: ExpertPool, rng: Rng, name: str) -> None:
    weights = random_weights(rng, name, num_experts=E, hidden=64, width=3 * UNIT)
    layer = add_layer(pool, weights)
    kept_N = np.array([0, 3, 1, 2, 0, 3], np.int32) * UNIT
    for num_experts in range(E + 1):
        ids_TS = np.full((3, E), -1, np.int32)
        ids_TS[:, :num_experts] = rng.permutation(E)[:num_experts]
        step = random_step(rng, num_tokens=3, hidden=64, num_experts=E, top_k=E)
        step = replace(step, ids_TS=ids_TS)
        kept = int(kept_N[num_experts])
        expected_TH = run_kept(pool, layer, step, table(kept))
        assert np.array_equal(run_kept(pool, layer, step, kept_N), expected_TH)
        if kept and num_experts:
            assert relative_error(expected_TH, reference(narrow(weights, kept), step)) < 2e-3
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", FEW_PATHS)
def test_biases(pool: ExpertPool, rng: Rng, name: str) -> None:
    mlp = random_mlp(rng, "silu", E, 64, 2 * UNIT)
    weights = random_weights(rng, name, num_experts=E, hidden=64, width=2 * UNIT, mlp=mlp)
    layer = add_layer(pool, weights)
    step = random_step(rng, num_tokens=6, hidden=64, num_experts=E)
    out_TH = run_kept(pool, layer, step, table(UNIT))
    assert relative_error(out_TH, reference(narrow(weights, UNIT), step)) < 2e-3
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_bits_depend_neither_on_threads_nor_on_tokens(rng: Rng, name: str) -> None:
    """So large that workers take pieces from each other."""
    weights = random_weights(rng, name, num_experts=E, hidden=500, width=700)
    step = random_step(rng, num_tokens=21, hidden=500, num_experts=E)
    kept_N = table(3 * UNIT)
    results = []
    for num_threads in (1, 2, 5):
        with ExpertPool(num_threads) as pool:
            layer = add_layer(pool, weights)
            results += [run_kept(pool, layer, step, kept_N) for _ in range(2)]
            alone = [run_kept(pool, layer, step.tokens([t]), kept_N)[0] for t in range(0, 21, 4)]
            assert np.array_equal(alone, results[0][::4])
    assert all(np.array_equal(result, results[0]) for result in results)


def test_what_does_not_fit_is_refused(pool: ExpertPool, rng: Rng) -> None:
    weights = random_weights(rng, "w4g64z-bf16/f32", num_experts=E, hidden=64, width=100)
    layer = add_layer(pool, weights)
    step = random_step(rng, num_tokens=2, hidden=64, num_experts=E)
    wrong: list[Any] = [table(32), table(101), table(-64), table(64)[1:], table(64).astype("i8")]
    for kept_N in wrong:
        with pytest.raises(ValueError, match="kept must"):
            pool.bind(layer, *step.arrays(), np.empty_like(step.x_TH), kept_N)
    pool.remove_layer(layer)

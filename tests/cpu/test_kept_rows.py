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
I32 = npt.NDArray[np.int32]


def run_kept(pool: ExpertPool, layer: ExpertLayer, step: Step, kept_N: I32) -> F32:
    """As ``run_step``, by the bell alone."""
    out_TH = np.full_like(step.x_TH, np.nan)
    pool.bind(layer, *step.arrays(), out_TH, kept_N)
    pool.workers.ring(layer.number)
    pool.wait()
    return out_TH


def cut(weights: Weights, step: Step, kept_N: I32) -> Weights:
    """For the reference: the routed experts end to end, without columns of w2 behind the kept."""
    w2_EHI, width = weights.w2_EHI.copy(), weights.w2_EHI.shape[2]
    routed = sorted(set(step.ids_TS.ravel().tolist()) - {-1})
    for n, expert in enumerate(routed):
        w2_EHI[expert, :, max(int(kept_N[len(routed)]) - n * width, 0) :] = 0
    return replace(weights, w2_EHI=w2_EHI)


def ends(num_routed: int, width: int) -> list[int]:
    """Rows to keep: none, all, whole experts, and parts of the first, the last and another one."""
    whole = width * np.arange(num_routed + 1)
    parts = [
        n * width + UNIT * part for n in (0, num_routed // 2, num_routed - 1) for part in (1, 2)
    ]
    return sorted({*whole.tolist(), *parts})


def table(num_routed: int, kept: int) -> I32:
    """For steps of so many experts."""
    kept_N = np.zeros(E + 1, np.int32)
    kept_N[num_routed] = kept
    return kept_N


def num_routed(step: Step) -> int:
    return len(set(step.ids_TS.ravel().tolist()) - {-1})


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_agrees_with_float64_wherever_it_ends(pool: ExpertPool, rng: Rng, name: str) -> None:
    weights = random_weights(rng, name, num_experts=E, hidden=HIDDEN, width=WIDTH)
    layer = add_layer(pool, weights)
    for num_tokens in (1, 2, 5, 8, 13, 17, 32):
        step = random_step(rng, num_tokens=num_tokens, hidden=HIDDEN, num_experts=E)
        whole_TH = run_step(pool, layer, step)
        count = num_routed(step)
        for kept in ends(count, WIDTH):
            kept_N = table(count, kept)
            out_TH = run_kept(pool, layer, step, kept_N)
            if kept == 0:
                assert not out_TH.any()
            elif kept == count * WIDTH:
                assert np.array_equal(out_TH, whole_TH)
            else:  # an element of act may have a neighbouring code where it is rounded
                error = relative_error(out_TH, reference(cut(weights, step, kept_N), step))
                assert error < (1e-5 if name.endswith("/f32") else 2e-3), (num_tokens, kept)
        assert np.array_equal(run_step(pool, layer, step), whole_TH)  # no table stays behind
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", FEW_PATHS)
def test_the_number_of_routed_experts_chooses(pool: ExpertPool, rng: Rng, name: str) -> None:
    width = 3 * UNIT
    weights = random_weights(rng, name, num_experts=E, hidden=64, width=width)
    layer = add_layer(pool, weights)
    kept_N = np.array([0, 3, 1, 5, 0, 15], np.int32) * UNIT
    for count in range(E + 1):
        ids_TS = np.full((3, E), -1, np.int32)
        ids_TS[:, :count] = rng.permutation(E)[:count]
        step = random_step(rng, num_tokens=3, hidden=64, num_experts=E, top_k=E)
        step = replace(step, ids_TS=ids_TS)
        kept = int(kept_N[count])
        expected_TH = run_kept(pool, layer, step, table(count, kept))
        assert np.array_equal(run_kept(pool, layer, step, kept_N), expected_TH)
        if kept:
            assert relative_error(expected_TH, reference(cut(weights, step, kept_N), step)) < 2e-3
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_bits_do_not_depend_on_threads(rng: Rng, name: str) -> None:
    """So large that workers take pieces from each other."""
    weights = random_weights(rng, name, num_experts=E, hidden=500, width=700)
    step = random_step(rng, num_tokens=21, hidden=500, num_experts=E)
    kept_N = np.arange(E + 1, dtype=np.int32) // 2 * 700
    kept_N[1:] += 3 * UNIT
    results = []
    for num_threads in (1, 2, 5):
        with ExpertPool(num_threads) as pool:
            layer = add_layer(pool, weights)
            results += [run_kept(pool, layer, step, kept_N) for _ in range(2)]
    assert all(np.array_equal(result, results[0]) for result in results)


def test_what_does_not_fit_is_refused(pool: ExpertPool, rng: Rng) -> None:
    weights = random_weights(rng, "w4g64z-bf16/f32", num_experts=E, hidden=64, width=100)
    layer = add_layer(pool, weights)
    step = random_step(rng, num_tokens=2, hidden=64, num_experts=E)
    wrong: list[Any] = [
        table(2, 32),  # not a group
        table(2, 101),  # an expert and less than a group
        table(2, 201),  # more than two experts
        table(2, -64),
        table(2, 64)[1:],
        table(2, 64).astype("i8"),
    ]
    for kept_N in wrong:
        with pytest.raises(ValueError, match="kept must"):
            pool.bind(layer, *step.arrays(), np.empty_like(step.x_TH), kept_N)
    pool.remove_layer(layer)


def test_experts_with_biases_are_computed_whole(pool: ExpertPool, rng: Rng) -> None:
    mlp = random_mlp(rng, "silu", E, 64, UNIT)
    weights = random_weights(rng, "bf16/f32", num_experts=E, hidden=64, width=UNIT, mlp=mlp)
    layer = add_layer(pool, weights)
    step = random_step(rng, num_tokens=2, hidden=64, num_experts=E)
    with pytest.raises(ValueError, match="with biases"):
        pool.bind(layer, *step.arrays(), np.empty_like(step.x_TH), table(2, UNIT))
    pool.remove_layer(layer)

"""What the expert pool promises: ids, place_of, views, layers that come and go."""

from typing import Any

import numpy as np
import pytest
from expert_layers import (
    BY_NAME,
    FEW_PATHS,
    TESTED_PATHS,
    Rng,
    Step,
    Weights,
    add_layer,
    changed,
    dense_weights,
    random_step,
    random_weights,
    reference,
    relative_error,
    run,
    run_step,
)

from cpu_kernels.bf16 import f32_to_bf16
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import dense_experts, packed_experts
from cpu_kernels.packed_layout import PackedShape

HIDDEN, WIDTH = 50, 33


@pytest.fixture(params=FEW_PATHS)
def weights(request: pytest.FixtureRequest, rng: Rng) -> Weights:
    return random_weights(rng, request.param, num_experts=4, hidden=HIDDEN, width=WIDTH)


@pytest.fixture
def step(rng: Rng) -> Step:
    return random_step(rng, num_tokens=9, hidden=HIDDEN, num_experts=4)


def agrees(weights: Weights, step: Step, out_TH: Any) -> bool:
    """Closely enough to tell right from wrong; test_expert_accuracy.py has the bounds."""
    return relative_error(out_TH, reference(weights, step)) < 2e-3


def test_tokens_without_a_choice_get_zeros(pool: ExpertPool, weights: Weights, step: Step) -> None:
    ids_TS = step.ids_TS.copy()
    ids_TS[::2] = -1
    step = changed(step, ids_TS=ids_TS)
    out_TH = run(pool, weights, step)
    assert not out_TH[::2].any() and agrees(weights, step, out_TH)
    nobody = changed(step, ids_TS=np.full_like(step.ids_TS, -1))
    assert np.array_equal(run(pool, weights, nobody), np.zeros_like(step.x_TH))


def test_no_tokens_and_no_choices(pool: ExpertPool, weights: Weights, step: Step) -> None:
    assert run(pool, weights, step.tokens(slice(0))).shape == (0, HIDDEN)
    none = changed(step, ids_TS=np.zeros((9, 0), np.int32), weights_TS=np.zeros((9, 0), np.float32))
    assert np.array_equal(run(pool, weights, none), np.zeros((9, HIDDEN), np.float32))


def test_the_same_expert_twice_for_a_token(pool: ExpertPool, weights: Weights, step: Step) -> None:
    twice = changed(step, ids_TS=np.full_like(step.ids_TS, 2))
    assert agrees(weights, twice, run(pool, weights, twice))


def test_many_choices_of_few_tokens(pool: ExpertPool, weights: Weights, rng: Rng) -> None:
    step = random_step(rng, num_tokens=2, hidden=HIDDEN, num_experts=4, top_k=40)
    assert agrees(weights, step, run(pool, weights, step))


def test_place_of_maps_ids_to_the_experts_held(
    pool: ExpertPool, weights: Weights, rng: Rng
) -> None:
    place_of = np.array([-1, 3, 0, -1, -1, 2, 1], np.int32)
    step = random_step(rng, num_tokens=11, hidden=HIDDEN, num_experts=7, top_k=3)
    layer = add_layer(pool, weights, place_of=place_of)
    out_TH = run_step(pool, layer, step)
    pool.remove_layer(layer)
    places_TS = np.where(step.ids_TS < 0, np.int32(-1), place_of[step.ids_TS])
    assert agrees(weights, changed(step, ids_TS=places_TS), out_TH)


def test_place_of_may_change_between_steps(pool: ExpertPool, weights: Weights, step: Step) -> None:
    place_of = np.arange(4, dtype=np.int32)
    layer = add_layer(pool, weights, place_of=place_of)
    assert agrees(weights, step, run_step(pool, layer, step))
    place_of[:] = [1, -1, 0, 2]
    places_TS = np.where(step.ids_TS < 0, np.int32(-1), place_of[step.ids_TS])
    assert agrees(weights, changed(step, ids_TS=places_TS), run_step(pool, layer, step))
    place_of[1] = 4
    with pytest.raises(ValueError, match="out of range"):
        run_step(pool, layer, step)
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", FEW_PATHS)
def test_no_experts_held(pool: ExpertPool, rng: Rng, name: str, step: Step) -> None:
    weights = random_weights(rng, name, num_experts=0, hidden=HIDDEN, width=WIDTH)
    layer = add_layer(pool, weights, place_of=np.full(4, -1, np.int32))
    assert np.array_equal(run_step(pool, layer, step), np.zeros_like(step.x_TH))
    pool.remove_layer(layer)
    with pytest.raises(ValueError, match="out of range"):
        run(pool, weights, step)


@pytest.mark.parametrize("bad", [-2, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("place", [(0, 0), (8, 1)])
def test_an_unknown_id_is_found_by_wait(
    pool: ExpertPool, weights: Weights, step: Step, bad: int, place: tuple[int, int]
) -> None:
    expected_TH = run(pool, weights, step)
    ids_TS = step.ids_TS.copy()
    ids_TS[place] = bad
    out_TH = np.full_like(step.x_TH, np.nan)
    layer = add_layer(pool, weights)
    pool.submit(layer, step.x_TH, ids_TS, step.weights_TS, out_TH)
    with pytest.raises(ValueError, match="expert id is out of range"):
        pool.wait()
    assert not out_TH.any()
    assert np.array_equal(run_step(pool, layer, step), expected_TH)  # the pool goes on
    pool.remove_layer(layer)


def test_a_submit_waits_for_the_one_before(pool: ExpertPool, weights: Weights, step: Step) -> None:
    layer = add_layer(pool, weights)
    outs = [np.full_like(step.x_TH, np.nan) for _ in range(3)]
    for out_TH in outs:
        pool.submit(layer, *step.arrays(), out_TH)
    pool.wait()
    pool.wait()  # nothing to wait for
    assert all(np.array_equal(out_TH, outs[0]) for out_TH in outs)
    assert agrees(weights, step, outs[0])
    pool.remove_layer(layer)


def test_changed_contents_of_the_same_arrays(
    pool: ExpertPool, weights: Weights, step: Step, rng: Rng
) -> None:
    layer = add_layer(pool, weights)
    out_TH = np.empty_like(step.x_TH)
    for _ in range(3):
        step.x_TH[:] = rng.standard_normal(step.x_TH.shape)
        step.ids_TS[:] = rng.integers(-1, 4, step.ids_TS.shape)
        pool.submit(layer, *step.arrays(), out_TH)
        pool.wait()
        assert agrees(weights, step, out_TH)
    pool.remove_layer(layer)


def test_arrays_may_be_views_of_larger_ones(pool: ExpertPool, weights: Weights, step: Step) -> None:
    expected_TH = run(pool, weights, step)
    views = []
    for array in (*step.arrays(), np.empty_like(step.x_TH)):
        room = np.zeros((len(array) + 5, *array.shape[1:]), array.dtype)
        room[2:-3] = array
        views.append(room[2:-3])
    layer = add_layer(pool, weights)
    pool.submit(layer, *views)
    pool.wait()
    assert np.array_equal(views[3], expected_TH)
    assert not views[3].base[:2].any() and not views[3].base[-3:].any()
    pool.remove_layer(layer)


def odd(array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """The same contents at an address that is no multiple of two."""
    return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


@pytest.mark.parametrize("name", ["bf16/f32", "bf16/bf16", "f32/f32"])
def test_dense_weights_may_lie_anywhere(pool: ExpertPool, rng: Rng, name: str, step: Step) -> None:
    weights = random_weights(rng, name, num_experts=4, hidden=HIDDEN, width=WIDTH)
    w13_EFH, w2_EHI = (odd(array) for array in weights.experts.arrays)
    assert w13_EFH.ctypes.data % 2
    layer = pool.add_layer(dense_experts(w13_EFH, w2_EHI), activations=weights.path.activations)
    assert np.array_equal(run_step(pool, layer, step), run(pool, weights, step))
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", ["w4g64z-bf16/f32", "w4g32z/int8"])
def test_packed_experts_may_lie_apart_and_anywhere(
    pool: ExpertPool, rng: Rng, name: str, step: Step
) -> None:
    weights = random_weights(rng, name, num_experts=4, hidden=HIDDEN, width=WIDTH)
    [blob_EB] = weights.experts.arrays
    room = np.full((4, blob_EB.shape[1] + 77), 255, np.uint8)
    room[:, 13:-64] = blob_EB
    shape = PackedShape(weights.path.kind, HIDDEN, WIDTH)
    for view_EB in (room[:, 13:-64], odd(blob_EB)):
        experts = packed_experts(view_EB, shape)
        layer = pool.add_layer(experts, activations=weights.path.activations)
        assert np.array_equal(run_step(pool, layer, step), run(pool, weights, step))
        pool.remove_layer(layer)


def test_layers_come_and_go(pool: ExpertPool, rng: Rng, step: Step) -> None:
    """Their places in the pool are used again: more layers than a pool has room for at a time."""
    weights = random_weights(rng, "bf16/f32", num_experts=4, hidden=HIDDEN, width=WIDTH)
    expected_TH = run(pool, weights, step)
    for _ in range(5000):
        pool.remove_layer(add_layer(pool, weights))
    assert np.array_equal(run(pool, weights, step), expected_TH)


def test_weights_live_as_long_as_their_layer(pool: ExpertPool, rng: Rng, step: Step) -> None:
    """Nobody else refers to the arrays after this."""
    w13_EFH, w2_EHI = (rng.standard_normal((4, *s), np.float32) for s in ((66, 50), (50, 33)))
    kept = dense_weights(BY_NAME["bf16/f32"], w13_EFH, w2_EHI)
    layer = pool.add_layer(dense_experts(f32_to_bf16(w13_EFH), f32_to_bf16(w2_EHI)))
    junk = [np.full((4, 66, 50), 0x7FC0, np.uint16) for _ in range(20)]  # would take freed memory
    assert np.array_equal(run_step(pool, layer, step), run(pool, kept, step))
    assert junk
    pool.remove_layer(layer)


def test_every_tested_path_is_one() -> None:
    assert set(FEW_PATHS) <= set(TESTED_PATHS) <= set(BY_NAME)

"""What the expert pool refuses, with ValueError and before anything runs."""

from typing import Any

import numpy as np
import pytest
from expert_layers import (
    Rng,
    Step,
    add_layer,
    changed,
    random_matrix,
    random_step,
    random_weights,
    run,
    run_step,
)

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts, Mlp, dense_experts, packed_experts
from cpu_kernels.packed_layout import PackedShape, pack_expert
from cpu_kernels.weight_kind import parse_kind

HIDDEN, WIDTH = 50, 33


@pytest.fixture
def step(rng: Rng) -> Step:
    return random_step(rng, num_tokens=9, hidden=HIDDEN, num_experts=4)


BROKEN_STEPS = {
    "x in float64": lambda s: changed(s, x_TH=s.x_TH.astype(float)),
    "x too narrow": lambda s: changed(s, x_TH=s.x_TH[:, 1:].copy()),
    "x of fewer tokens": lambda s: changed(s, x_TH=s.x_TH[1:]),
    "x not contiguous": lambda s: changed(s, x_TH=np.asfortranarray(s.x_TH)),
    "ids in int64": lambda s: changed(s, ids_TS=s.ids_TS.astype(np.int64)),
    "ids of one dimension": lambda s: changed(s, ids_TS=s.ids_TS[:, 0].copy()),
    "ids not contiguous": lambda s: changed(s, ids_TS=s.ids_TS[:, ::-1]),
    "weights in float64": lambda s: changed(s, weights_TS=s.weights_TS.astype(float)),
    "weights of fewer choices": lambda s: changed(s, weights_TS=s.weights_TS[:, :1].copy()),
    "weights not contiguous": lambda s: changed(s, weights_TS=s.weights_TS[:, ::-1]),
}


@pytest.mark.parametrize("what", BROKEN_STEPS)
def test_a_step_that_does_not_fit_is_refused_before_it_runs(
    pool: ExpertPool, rng: Rng, step: Step, what: str
) -> None:
    weights = random_weights(rng, "bf16/f32", num_experts=4, hidden=HIDDEN, width=WIDTH)
    expected_TH = run(pool, weights, step)
    layer = add_layer(pool, weights)
    out_TH = np.full_like(step.x_TH, 7)
    with pytest.raises(ValueError, match=what.split()[0]):
        pool.submit(layer, *BROKEN_STEPS[what](step).arrays(), out_TH)
    assert (out_TH == 7).all()
    assert np.array_equal(run_step(pool, layer, step), expected_TH)  # the pool goes on
    pool.remove_layer(layer)


def test_out_must_fit(pool: ExpertPool, rng: Rng, step: Step) -> None:
    weights = random_weights(rng, "bf16/f32", num_experts=4, hidden=HIDDEN, width=WIDTH)
    layer = add_layer(pool, weights)
    read_only = np.empty((9, HIDDEN), np.float32)
    read_only.flags.writeable = False
    turned = np.empty((HIDDEN, 9), np.float32).T
    for out in (np.empty((9, 7), np.float32), np.empty((9, HIDDEN)), turned, read_only):
        with pytest.raises(ValueError, match="out"):
            pool.submit(layer, *step.arrays(), out)
    pool.remove_layer(layer)


W13, W2 = np.zeros((2, 10, 8), np.uint16), np.zeros((2, 8, 5), np.uint16)


@pytest.mark.parametrize(
    ("w13", "w2", "match"),
    [
        (W13, W2.astype(np.float32), "w13 must be float32"),
        (W13.astype(float), W2.astype(float), "w2 must be uint16 or float32"),
        (W13[:, :5].copy(), W2, "w13 must have the shape"),
        (W13[:1], W2, "w13 must have the shape"),
        (W13[:, ::-1], W2, "w13 must be C-contiguous"),
        (W13, np.zeros((2, 5, 8), np.uint16).transpose(0, 2, 1), "w2 must be C-contiguous"),
        (W13, W2[0], "w2 must be"),
    ],
)
def test_dense_weights_that_do_not_fit_are_refused(w13: Any, w2: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dense_experts(w13, w2)


@pytest.mark.parametrize(
    ("mlp", "match"),
    [
        (Mlp(b13_EF=np.zeros((2, 5), np.float32)), "b13 must have the shape"),
        (Mlp(b13_EF=np.zeros((2, 10))), "b13 must be float32"),
        (Mlp(b2_EH=np.zeros((3, 8), np.float32)), "b2 must have the shape"),
        (Mlp(b2_EH=np.zeros((8, 2), np.float32).T), "b2 must be C-contiguous"),
    ],
)
def test_biases_that_do_not_fit_are_refused(mlp: Mlp, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dense_experts(W13, W2, mlp)


def test_packed_experts_that_do_not_fit_are_refused(rng: Rng) -> None:
    kind = parse_kind("w4g64")
    gate, up, down = (random_matrix(rng, kind, *size) for size in ((5, 8), (5, 8), (8, 5)))
    blob_EB = np.stack([pack_expert(kind, gate, up, down)] * 2)
    shape = PackedShape(kind, hidden=8, width=5)
    assert packed_experts(blob_EB, shape).num_experts == 2
    strided = np.repeat(blob_EB, 2, axis=1)[:, ::2]
    for broken in (blob_EB[:, 1:], blob_EB[0], blob_EB.view(np.int8), strided):
        with pytest.raises(ValueError, match="packed expert"):
            packed_experts(broken, shape)


def small_experts(name: str) -> Experts:
    return random_weights(np.random.default_rng(0), name, hidden=8, width=5).experts


@pytest.mark.parametrize(
    ("name", "activations", "match"),
    [
        ("f32/f32", "bf16", "f32 weights take activations in f32, not bf16"),
        ("bf16/f32", "int8", "bf16 weights take activations in f32 or bf16, not int8"),
        ("w4g128/f32", "bf16", "w4g128 weights take activations in f32 or int8, not bf16"),
    ],
)
def test_activations_that_no_kernel_has(
    pool: ExpertPool, name: str, activations: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        pool.add_layer(small_experts(name), activations=activations)


@pytest.mark.parametrize(
    "place_of",
    [
        np.array([0, 3], np.int32),
        np.array([-2, 0], np.int32),
        np.array([0, 1], np.int64),
        np.array([[0, 1]], np.int32),
        np.arange(6, dtype=np.int32)[::2],
    ],
)
def test_place_of_that_does_not_fit_is_refused(pool: ExpertPool, place_of: Any) -> None:
    with pytest.raises(ValueError, match="place_of"):
        pool.add_layer(small_experts("bf16/f32"), place_of=place_of)

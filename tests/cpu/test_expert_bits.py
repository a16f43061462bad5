"""What an output's bits do not depend on: threads, other tokens, tiles, layers around it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from expert_layers import (
    FEW_PATHS,
    TESTED_PATHS,
    Rng,
    Step,
    add_layer,
    normal,
    random_step,
    random_weights,
    run,
    run_step,
)

from cpu_kernels.expert_pool import ExpertPool


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_number_of_threads(rng: Rng, name: str) -> None:
    weights = random_weights(rng, name, num_experts=5, hidden=203, width=131)
    step = random_step(rng, num_tokens=37, hidden=203, num_experts=5)
    results = []
    for num_threads in (1, 2, 3, 7):
        with ExpertPool(num_threads) as pool:
            results += [run(pool, weights, step) for _ in range(2)]
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_other_tokens(pool: ExpertPool, rng: Rng, name: str) -> None:
    """Each token alone (a tile of one) has the bits it has among others, in any tile."""
    weights = random_weights(rng, name, hidden=150, width=70)
    layer = add_layer(pool, weights)
    step = random_step(rng, num_tokens=41, hidden=150, num_experts=3)
    together_TH = run_step(pool, layer, step)
    for token in range(41):
        alone_TH = run_step(pool, layer, step.tokens([token]))
        assert np.array_equal(alone_TH[0], together_TH[token])
    for count in range(2, 41, 3):
        chosen_M = rng.permutation(41)[:count]
        assert np.array_equal(run_step(pool, layer, step.tokens(chosen_M)), together_TH[chosen_M])
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", TESTED_PATHS)
def test_tiles_of_tokens(pool: ExpertPool, rng: Rng, name: str) -> None:
    """1 to 17 copies of a token at one expert: every tile and every place in it."""
    weights = random_weights(rng, name, num_experts=1, hidden=100, width=45)
    layer = add_layer(pool, weights)
    x_1H = normal(rng, 1, 100)
    rows = []
    for count in range(1, 18):
        ids_TS, weights_TS = np.zeros((count, 1), np.int32), np.ones((count, 1), np.float32)
        step = Step(x_TH=np.repeat(x_1H, count, axis=0), ids_TS=ids_TS, weights_TS=weights_TS)
        rows += list(run_step(pool, layer, step))
    assert all(np.array_equal(row, rows[0]) for row in rows)
    pool.remove_layer(layer)


@pytest.mark.parametrize("name", FEW_PATHS)
def test_order_of_a_tokens_choices(pool: ExpertPool, rng: Rng, name: str) -> None:
    """Experts are added up in the order of their numbers, however they were listed."""
    weights = random_weights(rng, name, num_experts=6, hidden=64, width=33)
    step = random_step(rng, num_tokens=20, hidden=64, num_experts=6)
    step = Step(
        x_TH=step.x_TH,
        ids_TS=np.tile(np.arange(6, dtype=np.int32), (20, 1)),
        weights_TS=rng.random((20, 6), np.float32),
    )
    expected_TH = run(pool, weights, step)
    for _ in range(3):
        order_S = rng.permutation(6)
        turned = Step(
            x_TH=step.x_TH,
            ids_TS=np.ascontiguousarray(step.ids_TS[:, order_S]),
            weights_TS=np.ascontiguousarray(step.weights_TS[:, order_S]),
        )
        assert np.array_equal(run(pool, weights, turned), expected_TH)


def test_order_of_layers(pool: ExpertPool, rng: Rng) -> None:
    """Layers of all kinds and sizes share scratch; none finds what another has left there."""
    sizes = [(int(h), int(w)) for h, w in rng.integers(1, 140, (2 * len(TESTED_PATHS), 2))]
    layers, steps = [], []
    for name, (hidden, width) in zip(2 * TESTED_PATHS, sizes, strict=True):
        layers.append(add_layer(pool, random_weights(rng, name, hidden=hidden, width=width)))
        num_tokens = int(rng.integers(1, 40))
        steps.append(random_step(rng, num_tokens=num_tokens, hidden=hidden, num_experts=3))
    pairs = list(zip(layers, steps, strict=True))
    expected = [run_step(pool, *pair) for pair in pairs]
    for _ in range(4):
        for n in rng.permutation(len(pairs)):
            assert np.array_equal(run_step(pool, *pairs[n]), expected[n])
    for layer in layers:
        pool.remove_layer(layer)


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process that never lets go of a core."""
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


@pytest.mark.parametrize("num_calls", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_calls_beside_a_busy_process(pool: ExpertPool, rng: Rng, num_calls: int) -> None:
    names = 2 * FEW_PATHS
    layers = [
        add_layer(pool, random_weights(rng, name, num_experts=4, hidden=24, width=17))
        for name in names
    ]
    calls = [
        (layer, random_step(rng, num_tokens=int(count), hidden=24, num_experts=4))
        for layer in layers
        for count in rng.integers(0, 12, 5)
    ]
    expected = [run_step(pool, *call) for call in calls]
    with busy_neighbour():
        for n in rng.integers(0, len(calls), num_calls):
            assert np.array_equal(run_step(pool, *calls[n]), expected[n])
    for layer in layers:
        pool.remove_layer(layer)

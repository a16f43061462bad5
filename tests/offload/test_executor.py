"""The split of a layer between device and pool, with a pool in float64 that notes what it is given.

E experts, T tokens, K top-k, H hidden.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import DENSE, Experts
from offload.cold_weights import NUMPY_DTYPES
from offload.executor import HybridExperts, warm_up
from offload.expert_store import ExpertShape, ExpertStore
from offload.host_buffers import MAX_KEPT, HostBuffers
from offload.placement import Placement
from offload.worker_pool import WorkerPool

E, K, H, WIDTH = 6, 2, 8, 4
MAX_TOKENS = 5
SHAPE = ExpertShape(num_layers=2, moe_layers=(1,), num_experts=E, hidden_size=H, expert_size=WIDTH)
CPU = torch.device("cpu")


class Float64Pool:
    """Does at once what the pool does later."""

    def __init__(self) -> None:
        self.layers: list[tuple[Experts, Any]] = []
        self.steps: list[tuple[np.ndarray, ...]] = []

    def add_layer(self, experts: Experts, *, activations: str = "f32", place_of: Any = None) -> int:
        assert activations == "f32"
        self.layers.append((experts, place_of))
        return len(self.layers) - 1

    def remove_layer(self, layer: int) -> None:
        del self.layers[layer]

    def submit(self, layer: int, x: Any, ids: Any, weights: Any, out: Any) -> None:
        self.steps.append((x, ids, weights, out))
        experts, place_of = self.layers[layer]
        w13, w2 = (array.astype(np.float64) for array in experts.arrays)
        out[:] = 0
        for t, k in np.ndindex(ids.shape):
            place = place_of[ids[t, k]]
            if place >= 0:
                gate, up = np.split(w13[place] @ x[t], 2)
                out[t] += weights[t, k] * (w2[place] @ (gate / (1 + np.exp(-gate)) * up))

    def wait(self) -> None:
        pass


def store_of(resident: set[int], dtype: torch.dtype = torch.float32) -> ExpertStore:
    store = ExpertStore(SHAPE, Placement.of([(), tuple(resident)]), device=CPU, dtype=dtype)

    def fill(layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(expert)
        w13.copy_(torch.randn(w13.shape, generator=generator))
        w2.copy_(torch.randn(w2.shape, generator=generator))

    store.fill(fill, num_threads=1)
    return store


def hybrid(resident: set[int], pool: WorkerPool, dtype: torch.dtype) -> HybridExperts:
    return HybridExperts(
        store_of(resident, dtype), pool, device=CPU, max_tokens=MAX_TOKENS, top_k=K
    )


def step(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_tokens, H, generator=generator)
    ids_TK = torch.rand(num_tokens, E, generator=generator).argsort(dim=1)[:, :K]
    return x_TH, ids_TK, torch.rand(num_tokens, K, generator=generator)


def run(experts: HybridExperts, num_tokens: int, seed: int) -> torch.Tensor:
    experts.begin_step(num_tokens)
    return experts.launch(1, *step(num_tokens, seed)).result().clone()


def brute_force(
    store: ExpertStore, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            w13_FH, w2_HI = (w.double() for w in store.weights(1, expert))
            gate_I, up_I = (w13_FH @ x_TH[t].double()).chunk(2)
            y_H = w2_HI @ (torch.nn.functional.silu(gate_I) * up_I)
            out_TH[t] += weights_TK[t, k].double() * y_H
    return out_TH


@settings(max_examples=50)
@given(st.sets(st.integers(0, E - 1)), st.integers(1, MAX_TOKENS), st.integers(0, 99))
def test_both_sides_add_up_wherever_the_experts_are(
    resident: set[int], num_tokens: int, seed: int
) -> None:
    pool = Float64Pool()
    experts = hybrid(resident, pool, torch.float32)
    x_TH, ids_TK, weights_TK = step(num_tokens, seed)
    found_TH = run(experts, num_tokens, seed)
    expected_TH = brute_force(experts._store, x_TH, ids_TK, weights_TK)
    torch.testing.assert_close(found_TH.double(), expected_TH, rtol=1e-4, atol=1e-5)
    is_cold_TK = torch.tensor([[e not in resident for e in row] for row in ids_TK.tolist()])
    assert experts.routing.cold_T.tolist() == is_cold_TK.sum(dim=1).tolist()
    assert experts.routing.hot_T.tolist() == (~is_cold_TK).sum(dim=1).tolist()
    assert experts.routed_ids(slice(0, num_tokens))[:, 1].tolist() == ids_TK.tolist()
    assert len(pool.steps) == int(is_cold_TK.any())  # the pool rests if nothing is cold
    if pool.steps:
        _, ids, weights, _ = pool.steps[0]
        assert ids.dtype == np.int32 and ids.tolist() == ids_TK.tolist()
        assert weights.tolist() == weights_TK.tolist()


def test_steps_of_one_length_bring_the_same_arrays() -> None:
    pool = Float64Pool()
    experts = hybrid(set(), pool, torch.float32)
    for num_tokens, seed in ((1, 0), (3, 1), (1, 2), (3, 3)):
        run(experts, num_tokens, seed)
    one, three, one_again, three_again = pool.steps
    assert all(a is b for a, b in zip(one, one_again, strict=True))
    assert all(a is b for a, b in zip(three, three_again, strict=True))


def test_few_lengths_are_kept() -> None:
    buffers = HostBuffers(2 * MAX_KEPT, H, K, pin=False)
    for num_tokens in range(1, 2 * MAX_KEPT + 1):
        assert len(buffers.rows(num_tokens).arrays[0]) == num_tokens
        assert len(buffers._rows) <= MAX_KEPT


def test_the_pool_forgets_the_layers() -> None:
    pool = Float64Pool()
    experts = hybrid({1}, pool, torch.float32)
    assert len(pool.layers) == 1
    experts.clear()
    experts.clear()
    assert pool.layers == []


def test_a_layer_without_cold_experts_is_none_of_the_pools() -> None:
    pool = Float64Pool()
    hybrid(set(range(E)), pool, torch.float32)
    assert pool.layers == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_pool_agrees(dtype: torch.dtype) -> None:
    with ExpertPool(1) as pool:
        warm_up(pool, DENSE[NUMPY_DTYPES[dtype]])
        experts = hybrid({0, 3}, pool, dtype)
        for num_tokens in (1, MAX_TOKENS, 1):
            found_TH = run(experts, num_tokens, seed=num_tokens)
            expected_TH = brute_force(experts._store, *step(num_tokens, num_tokens))
            torch.testing.assert_close(found_TH.double(), expected_TH, rtol=1e-4, atol=1e-5)
        experts.clear()

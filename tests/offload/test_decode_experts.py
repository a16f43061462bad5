"""The device divides the experts: the same sums and counts as brute force, with real workers.

E experts, T rows, K top-k, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.weight_kind import WeightKind, parse_kind
from offload.adaptive import Swap
from offload.adaptive_placement import AdaptivePlacement
from offload.cold_share import ShareCosts
from offload.decode_experts import DecodeExperts, why_not
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore
from offload.handoff import EagerHandOff
from offload.placement import Placement
from tests.offload import swap_store

E, K, H, WIDTH = 6, 2, 16, 32
MOE_LAYERS = (1, 2)
SHAPE = ExpertShape(
    num_layers=4, moe_layers=MOE_LAYERS, num_experts=E, hidden_size=H, expert_size=WIDTH
)
CPU = torch.device("cpu")


def make_store(*resident: set[int], dtype: torch.dtype = torch.float32) -> ExpertStore:
    store = ExpertStore(SHAPE, Placement.of([(), *resident, ()]), device=CPU, dtype=dtype)

    def fill(layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(10 * layer + expert)
        w13.copy_(torch.randn(w13.shape, generator=generator) * H**-0.5)
        w2.copy_(torch.randn(w2.shape, generator=generator) * WIDTH**-0.5)

    store.fill(fill, num_threads=1)
    return store


# Sides without a start, at these speeds: of cold experts the device pulls nothing, half, all.
SHARES = {
    "none": None,
    "half": ShareCosts(
        cpu_bytes_per_s=1e9,
        link_bytes_per_s=1.1e9,
        cpu_start_s=0.0,
        link_start_s=0.0,
        unit=16,
    ),
    "all": ShareCosts(
        cpu_bytes_per_s=1.0, link_bytes_per_s=1e12, cpu_start_s=1.0, link_start_s=0.0
    ),
}


@contextmanager
def decode_experts(
    *resident: set[int], share: ShareCosts | None = None
) -> Iterator[tuple[HybridExperts, DecodeExperts]]:
    with ExpertPool(1) as pool:
        hybrid = HybridExperts(make_store(*resident), pool, device=CPU, max_tokens=8, top_k=K)
        hand_off = EagerHandOff(pool.workers, lambda: None)
        yield (
            hybrid,
            DecodeExperts(
                hybrid, pool.workers, hand_off, dtype=torch.float32, max_rows=4, share=share
            ),
        )


def make_step(num_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_rows, H, generator=generator)
    ids_TK = torch.rand(num_rows, E, generator=generator).argsort(dim=1)[:, :K].int()
    return x_TH, ids_TK.contiguous(), torch.rand(num_rows, K, generator=generator)


def brute_force(
    store: ExpertStore, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, w_TK: torch.Tensor
) -> torch.Tensor:
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            w13_FH, w2_HI = (w.double() for w in store.weights(layer, expert))
            gate_I, up_I = (w13_FH @ x_TH[t].double()).chunk(2)
            out_TH[t] += w_TK[t, k] * (w2_HI @ (torch.nn.functional.silu(gate_I) * up_I))
    return out_TH


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("resident", [(set(), set()), ({0, 3}, set(range(E))), ({1, 5}, {2})])
def test_parts_add_up_and_are_counted(resident: tuple[set[int], set[int]], share: str) -> None:
    with decode_experts(*resident, share=SHARES[share]) as (hybrid, experts):
        counts = torch.zeros(4, E, dtype=torch.int64)
        for num_rows, num_used in ((1, 1), (4, 3), (2, 2), (4, 4)):
            used = torch.tensor([num_used], dtype=torch.int32)
            record_LTK = torch.zeros(experts.record_shape(num_rows), dtype=torch.int32)
            backend = experts.step(num_rows, used, record_LTK)
            experts.bind(num_rows)
            hybrid.begin_step(num_used)
            chosen = {}
            for layer in MOE_LAYERS:
                x_TH, ids_TK, weights_TK = make_step(num_rows, seed=10 * num_rows + layer)
                parts = backend.launch(layer, x_TH, ids_TK, weights_TK).parts()
                is_pulled = share != "none" and len(resident[layer - 1]) < E
                is_cold = len(resident[layer - 1]) < E
                assert len(parts) == bool(resident[layer - 1]) + is_pulled + is_cold
                if share == "all" and is_cold:
                    assert parts[-1].eq(0).all()  # the workers had nothing to do
                found_TH = sum(part.clone() for part in parts)
                wanted_TH = brute_force(hybrid.store, layer, x_TH, ids_TK, weights_TK)
                torch.testing.assert_close(
                    found_TH[:num_used].double(), wanted_TH[:num_used], rtol=1e-4, atol=1e-5
                )
                assert found_TH[num_used:].eq(0).all()
                chosen[layer] = ids_TK[:num_used]
                counts[layer] += ids_TK[:num_used].flatten().bincount(minlength=E)
            experts.finish(record_LTK.numpy()[:, :num_used], range(num_used))
            check_routing(hybrid, resident, chosen, num_used)
            cold = sum(
                len(set(ids_TK.flatten().tolist()) - here)
                for ids_TK, here in zip(chosen.values(), resident, strict=True)
            )
            pulled = experts.pulled_bytes(hybrid.routing) / hybrid.store.mean_expert_bytes
            assert {"none": pulled == 0, "half": 0 <= pulled < max(cold, 1), "all": pulled == cold}[
                share
            ]
        assert hybrid.counts_LE.tolist() == counts.tolist()


# kinds that other tests of the CPU side compile too
MIXED = {1: parse_kind("w4g32z"), 2: parse_kind("w8g32-bf16"), 3: parse_kind("w4g32")}


def check_routing(
    hybrid: HybridExperts,
    resident: tuple[set[int], set[int]],
    chosen: dict[int, torch.Tensor],
    num_used: int,
) -> None:
    routed = hybrid.routed_ids(slice(0, num_used))
    assert (routed[:, [0, 3]] == -1).all()
    num_hot_T = torch.zeros(num_used, dtype=torch.int64)
    for layer, experts in zip(MOE_LAYERS, resident, strict=True):
        assert routed[:, layer].tolist() == chosen[layer].tolist()
        num_hot_T += torch.tensor(
            [[e in experts for e in row] for row in chosen[layer].tolist()]
        ).sum(1)
    assert hybrid.routing.hot_T.tolist() == num_hot_T.tolist()
    assert hybrid.routing.cold_T.tolist() == (2 * K - num_hot_T).tolist()


@pytest.mark.parametrize("share", [pytest.param("none", marks=pytest.mark.slow), "half"])
@pytest.mark.parametrize("kind", [None, parse_kind("w4g32z"), MIXED], ids=["f32", "w4", "mixed"])
def test_parts_add_up_whatever_moves(
    share: str, kind: WeightKind | dict[int, WeightKind] | None
) -> None:
    rng = np.random.default_rng(0)
    store = swap_store.make_store(CPU, {0, 3}, {1, 2, 4, 5}, {5}, kind=kind)

    def choose(heat: object, is_resident: object, layers: list[int], most: int) -> list[Swap]:
        return swap_store.random_swaps(rng, store, layers)[:most]

    adaptive = AdaptivePlacement(store, CPU, choose=choose, copy_share=1e9)
    used = torch.tensor([3], dtype=torch.int32)
    with ExpertPool(1) as pool:
        hybrid = HybridExperts(store, pool, device=CPU, max_tokens=8, top_k=K)
        experts = DecodeExperts(
            hybrid,
            pool.workers,
            EagerHandOff(pool.workers, lambda: None),
            dtype=torch.float32,
            max_rows=4,
            share=SHARES[share],
            adaptive=adaptive,
        )
        pulled = {} if experts.pulled is None else experts.pulled.layers
        assert sorted(pulled) == ([] if share == "none" else [1, 2, 3])
        if experts.pulled is not None:
            half = [n * swap_store.WIDTH // 2 for n in range(5)]
            assert experts.pulled.kept_rows(1).tolist() == half
        for step in range(5):
            if step == 3:
                adaptive.settle()
                swap_store.check(store, is_settled=True)
            experts.move_experts()
            swap_store.check(store)
            experts.bind(4)
            hybrid.begin_step(3)
            record_LTK = torch.zeros(experts.record_shape(4), dtype=torch.int32)
            backend = experts.step(4, used, record_LTK)
            for layer in swap_store.MOE_LAYERS:
                x_TH, ids_TK, weights_TK = make_step(4, seed=10 * step + layer)
                parts = backend.launch(layer, x_TH, ids_TK, weights_TK).parts()
                found_TH = sum(part.clone() for part in parts)
                wanted_TH = brute_force(store, layer, x_TH, ids_TK, weights_TK)
                torch.testing.assert_close(
                    found_TH[:3].double(), wanted_TH[:3], rtol=1e-4, atol=1e-5
                )
            num_hot = sum(
                int((store[layer].slot_E[ids[:3]] >= 0).sum())
                for layer, ids in (
                    (layer, make_step(4, seed=10 * step + layer)[1].numpy())
                    for layer in swap_store.MOE_LAYERS
                )
            )
            experts.finish(record_LTK.numpy()[:, :3], range(3))
            assert hybrid.routing.hot_T.sum() == num_hot
    assert adaptive.num_swaps > 4


def test_what_the_device_cannot_divide_is_said() -> None:
    assert why_not(make_store({1}, set()), torch.float32, K) == ""
    assert why_not(make_store(set(), set(), dtype=torch.bfloat16), torch.float32, K) == ""
    mixed = make_store({1}, set(), dtype=torch.bfloat16)
    assert "stored in another type than torch.float32" in why_not(mixed, torch.float32, K)
    assert "17 experts per token" in why_not(mixed, torch.bfloat16, 17)

"""Layers whose experts are all on the device: the host waits for none of them, and knows all after.

Without a GPU the kernels run in Triton's interpreter. T tokens, K top-k, E experts, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore
from offload.expert_stream import ExpertStream
from offload.host_buffers import HostBuffers
from offload.placement import Placement
from offload.popularity import Popularity
from offload.prefill import PrefillExperts
from offload.prefill_costs import PrefillCosts
from offload.step_routing import StepRouting

E, K, H, WIDTH, MANY, FEW = 10, 3, 32, 16, 40, 5
LAYERS = (0, 1, 3)  # layer 2 is dense; of layer 3 some are cold, where it is asked for
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL, SOME = range(E), (1, 4, 9)


@contextmanager
def hybrid(last: range | tuple[int, ...]) -> Iterator[HybridExperts]:
    """Layers 0 and 1 have all experts on the device, layer 3 those of ``last``."""
    shape = ExpertShape(
        num_layers=4, moe_layers=LAYERS, num_experts=E, hidden_size=H, expert_size=WIDTH
    )
    placement = Placement.of([ALL, ALL, (), last])
    store = ExpertStore(shape, placement, device=DEVICE, dtype=torch.float32)

    def fill(layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(100 * layer + expert)
        w13.copy_(torch.randn(w13.shape, generator=generator) * H**-0.5)
        w2.copy_(torch.randn(w2.shape, generator=generator) * WIDTH**-0.5)

    store.fill(fill, num_threads=2)
    stream = ExpertStream(store, 4, DEVICE) if len(last) < E else None
    costs = PrefillCosts(copy_s=1.0, expert_s=lambda count: 1.0, columns_from=None)
    with ExpertPool(1) as pool:
        prefill = PrefillExperts(
            *(store, pool, stream, {3: costs} if stream else {}),
            Popularity.uniform(4, E),
            device=DEVICE,
            dtype=torch.float32,
            activations="f32",
            max_tokens=MANY,
            top_k=K,
        )
        experts = HybridExperts(
            store, pool, device=DEVICE, max_tokens=MANY, top_k=K, prefill=prefill
        )
        yield experts
        experts.clear()


def step(layer: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(layer)
    x_TH = torch.randn(num_tokens, H, generator=generator)
    ids_TK = torch.rand(num_tokens, E, generator=generator).argsort(dim=1)[:, :K]
    weights_TK = torch.rand(num_tokens, K, generator=generator)
    return x_TH.to(DEVICE), ids_TK.to(DEVICE), weights_TK.to(DEVICE)


def run(experts: HybridExperts, num_tokens: int) -> None:
    """A step of all layers, each compared with brute force."""
    experts.begin_step(num_tokens)
    for layer in LAYERS:
        x_TH, ids_TK, weights_TK = step(layer, num_tokens)
        found_TH = experts.launch(layer, x_TH, ids_TK, weights_TK).result()
        wanted_TH = torch.zeros(num_tokens, H, dtype=torch.float64)
        for t, ids in enumerate(ids_TK.tolist()):
            for k, expert in enumerate(ids):
                w13_FH, w2_HI = (w.cpu().double() for w in experts.store.weights(layer, expert))
                gate_I, up_I = (w13_FH @ x_TH[t].cpu().double()).chunk(2)
                y_H = w2_HI @ (torch.nn.functional.silu(gate_I) * up_I)
                wanted_TH[t] += weights_TK[t, k].cpu().double() * y_H
        torch.testing.assert_close(found_TH.cpu().double(), wanted_TH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
@pytest.mark.parametrize("last", [ALL, SOME], ids=len)
def test_what_was_chosen_is_known_after_the_step(last: range, num_tokens: int) -> None:
    with hybrid(last) as experts:
        for turn in (1, 2):
            run(experts, num_tokens)
            routing = experts.routing
            chosen = {layer: step(layer, num_tokens)[1].cpu().numpy() for layer in LAYERS}
            num_cold_T = (~np.isin(chosen[3], last)).sum(axis=1)
            assert routing.cold_T.tolist() == num_cold_T.tolist()
            assert routing.hot_T.tolist() == (len(LAYERS) * K - num_cold_T).tolist()
            assert routing.ids.keys() == chosen.keys()
            assert all(routing.ids[layer].tolist() == chosen[layer].tolist() for layer in LAYERS)
            assert all(ids.dtype == np.int16 for ids in routing.ids.values())
            resident = {layer: np.flatnonzero(routing.is_resident_LE[layer]) for layer in LAYERS}
            assert [len(resident[layer]) for layer in LAYERS] == [E, E, len(last)]
            counts = [np.bincount(chosen[layer].ravel(), minlength=E) for layer in LAYERS]
            assert experts.counts_LE[list(LAYERS)].tolist() == (turn * np.array(counts)).tolist()
        routed_TLK = experts.routed_ids(slice(0, num_tokens))
        assert all(routed_TLK[:, n].tolist() == chosen[n].tolist() for n in LAYERS)
        assert (routed_TLK[:, 2] == -1).all()


@pytest.mark.parametrize("num_tokens", [FEW, MANY])
def test_the_host_waits_for_none_of_them(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*_: object) -> None:
        raise AssertionError("the host was asked")

    with hybrid(ALL) as experts:
        monkeypatch.setattr(HostBuffers, "rows", waits)
        monkeypatch.setattr(PrefillExperts, "_wait_until_written", waits)
        run(experts, num_tokens)
    monkeypatch.undo()
    with hybrid(SOME) as experts:  # what layer 3 needs is sent while layer 1 is computed
        assert [experts._asks_the_host(layer, MANY) for layer in LAYERS] == [False, True, True]
        assert [experts._asks_the_host(layer, FEW) for layer in LAYERS] == [False, False, True]


def test_an_abandoned_step_is_not_told_with_the_next_one() -> None:
    with hybrid(ALL) as experts:
        experts.begin_step(MANY)
        experts.launch(0, *step(0, MANY))
        # a decode step, which is divided elsewhere, says so itself
        none = np.zeros(1, dtype=np.int64)
        experts.routing = StepRouting(none, none, {}, np.zeros((4, E), dtype=bool))
        assert experts.routing.hot_T.tolist() == [0] and not experts.routing.ids
        run(experts, FEW)
        assert experts.routing.hot_T.tolist() == FEW * [len(LAYERS) * K]

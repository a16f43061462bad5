"""Many tokens through residents, ring and pool, against a product for each pair in float64.

Without a GPU the ring's copies are made at once and the kernels run in Triton's interpreter.
E experts, T tokens, K top-k, H hidden.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from offload.adaptive import Swap
from offload.expert_store import ExpertShape, ExpertStore
from offload.expert_stream import ExpertStream
from offload.placement import Placement
from offload.popularity import Popularity
from offload.prefill import PrefillExperts
from offload.prefill_costs import PrefillCosts
from offload.prefill_layer import LayerWork
from offload.staging import bank_slots
from offload.swaps import Swaps
from offload.units import MIB

E, K, H, WIDTH, T = 10, 3, 32, 16, 23
LAYERS = (0, 2)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def store_of(
    resident: set[int], dtype: torch.dtype = torch.float32, *, has_spares: bool = False
) -> ExpertStore:
    shape = ExpertShape(
        num_layers=3, moe_layers=LAYERS, num_experts=E, hidden_size=H, expert_size=WIDTH
    )
    placement = Placement.of([resident, (), resident])
    store = ExpertStore(shape, placement, device=DEVICE, dtype=dtype, has_spares=has_spares)

    def fill(layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(100 * layer + expert)
        w13.copy_(torch.randn(w13.shape, generator=generator) * H**-0.5)
        w2.copy_(torch.randn(w2.shape, generator=generator) * WIDTH**-0.5)

    store.fill(fill, num_threads=2)
    return store


@contextmanager
def prefill(
    store: ExpertStore,
    num_slots: int,
    *,
    cpu_s: float = 1.0,
    dtype: torch.dtype = torch.float32,
    popularity: Popularity | None = None,
) -> Iterator[PrefillExperts]:
    """``cpu_s``: what an expert costs the CPU, in copies of one."""
    stream = ExpertStream(store, num_slots, DEVICE) if num_slots else None
    costs = PrefillCosts(copy_s=1.0, expert_s=lambda count: cpu_s, columns_from=None)
    with ExpertPool(1) as pool:
        experts = PrefillExperts(
            *(store, pool, stream),
            dict.fromkeys(LAYERS, costs),
            popularity or Popularity.uniform(3, E),
            device=DEVICE,
            dtype=dtype,
            activations="f32",
            max_tokens=T,
            top_k=K,
        )
        yield experts
        experts.clear()


def step(seed: int, num_tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(num_tokens, H, generator=generator)
    # popular experts and one that nobody chooses
    scores_TE = torch.rand(num_tokens, E, generator=generator) * torch.linspace(0, 1, E)
    ids_TK = scores_TE.argsort(dim=1, descending=True)[:, :K]
    weights_TK = torch.rand(num_tokens, K, generator=generator)
    return x_TH.to(DEVICE), ids_TK.to(DEVICE), weights_TK.to(DEVICE)


def run(experts: PrefillExperts, seed: int, num_tokens: int = T) -> list[torch.Tensor]:
    """Both layers of one step."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    experts.begin_step(num_tokens)
    found = []
    for layer in LAYERS:
        x_TH, ids_TK, weights_TK = step(seed + layer, num_tokens)
        pending = experts.launch(
            *(layer, x_TH, ids_TK, weights_TK),
            lambda ids, counts_E: seen.append((ids.copy(), counts_E)),
        )
        found.append(pending.result().cpu())
        ids, counts_E = seen[-1]
        assert ids.tolist() == ids_TK.tolist()
        assert counts_E.tolist() == ids_TK.flatten().bincount(minlength=E).tolist()
    return found


def expected(store: ExpertStore, layer: int, seed: int) -> torch.Tensor:
    x_TH, ids_TK, weights_TK = (t.cpu() for t in step(seed + layer))
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            w13_FH, w2_HI = (w.cpu().double() for w in store.weights(layer, expert))
            gate_I, up_I = (w13_FH @ x_TH[t].double()).chunk(2)
            y_H = w2_HI @ (torch.nn.functional.silu(gate_I) * up_I)
            out_TH[t] += weights_TK[t, k].double() * y_H
    return out_TH


def check(store: ExpertStore, experts: PrefillExperts, seed: int) -> list[torch.Tensor]:
    found = run(experts, seed)
    for layer, found_TH in zip(LAYERS, found, strict=True):
        wanted_TH = expected(store, layer, seed)
        torch.testing.assert_close(found_TH.double(), wanted_TH, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("resident", [set(), {1, 4, 9}, set(range(E))], ids=len)
@pytest.mark.parametrize(("num_slots", "cpu_s"), [(1, 9.0), (3, 2.0), (4, 0.1), (16, 1.0), (0, 1)])
def test_every_way_through_gives_the_sum(resident: set[int], num_slots: int, cpu_s: float) -> None:
    store = store_of(resident)
    with prefill(store, num_slots, cpu_s=cpu_s) as experts:
        check(store, experts, seed=1)


def test_workers_start_before_the_device() -> None:
    store = store_of({0})
    with prefill(store, 3, cpu_s=0.9) as experts:
        order: list[str] = []
        start, products = experts._start_pool, LayerWork.compute

        def started(*args: Any) -> None:
            order.append("workers")
            start(*args)

        def computed(work: LayerWork, *args: Any) -> torch.Tensor:
            order.append("device")
            return products(work, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experts, "_start_pool", started)
            patch.setattr(LayerWork, "compute", computed)
            check(store, experts, seed=3)
        assert order == ["workers", "device"] * len(LAYERS)
        assert experts.record.cpu_experts > 0 and experts.record.sent_experts > 0


def test_the_ring_is_whole_after_it_was_kept_busy() -> None:
    store = store_of({0})
    with prefill(store, 16, cpu_s=2.0) as experts:
        stream = experts._side.stream
        assert stream is not None
        with stream.kept_busy(LAYERS[0]):
            time.sleep(0.02)
        assert sorted(stream._free) == list(range(4))
        check(store, experts, seed=2)
        with pytest.raises(ZeroDivisionError), stream.kept_busy(LAYERS[0]):
            _ = 1 / 0
        assert stream.has_room


def test_popular_experts_are_sent_ahead() -> None:
    store = store_of({4})
    counts_LE = np.zeros((3, E), np.int64)
    counts_LE[2, [1, 4, 8]] = 5, 50, 7
    with prefill(store, 4, cpu_s=9.0, popularity=Popularity(counts_LE)) as experts:
        sent: list[tuple[int, list[int]]] = []
        stream = experts._side.stream
        assert stream is not None
        send = stream.send
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "send", lambda *a: sent.append(a) or send(*a))  # type: ignore[func-returns-value]
            experts.begin_step(T)
            x_TH, ids_TK, weights_TK = step(1)
            experts.launch(0, x_TH, ids_TK, weights_TK, lambda ids, counts_E: None).result()
        ahead = [row for layer, rows in sent if layer == 2 for row in rows]
        cold = np.flatnonzero(store[2].row_E >= 0)
        assert len(ahead) == 3 and cold[ahead].tolist() == [0, 1, 8]
        check(store, experts, seed=5)


@pytest.mark.parametrize(
    ("num_slots", "expert_mib", "slots"), [(64, 9, 8), (64, 2.4, 16), (16, 45, 2), (4, 168, 1)]
)
def test_banks_of_small_experts_hold_more(num_slots: int, expert_mib: float, slots: int) -> None:
    assert bank_slots(num_slots, int(expert_mib * MIB)) == slots


def test_banks_of_several_slots() -> None:
    store = store_of({0})
    with prefill(store, 16, cpu_s=2.0) as experts:
        stream = experts._side.stream
        assert stream is not None and stream.bank_size == 4
        check(store, experts, seed=2)


@pytest.mark.parametrize(("num_slots", "cpu_s"), [(3, 2.0), (16, 1.0), (0, 1)])
def test_experts_that_have_changed_places(num_slots: int, cpu_s: float) -> None:
    """Rows are in no order then, and one slot of the residents is free."""
    store = store_of({1, 4, 9}, has_spares=True)
    swaps = Swaps(store, DEVICE)
    with prefill(store, num_slots, cpu_s=cpu_s) as experts:
        wanted = run(experts, 1)
        for comes, leaves in ((8, 1), (2, 9), (1, 4)):
            swaps.start(Swap(layer, comes, leaves) for layer in LAYERS)
            swaps.settle()
            found = check(store, experts, seed=1)
        assert np.flatnonzero(store[2].slot_E >= 0).tolist() == [1, 2, 8]
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_of_float32_tokens() -> None:
    store = store_of({2, 3}, torch.bfloat16)
    if DEVICE.type == "cpu":
        pytest.skip("the interpreter has no bfloat16 products")
    with prefill(store, 4, cpu_s=1.0) as experts:
        check(store, experts, seed=1)


def test_steps_of_any_length_repeat_bit_for_bit() -> None:
    store = store_of({5})
    with prefill(store, 3, cpu_s=1.5) as experts:
        first = run(experts, 7)
        run(experts, 8, num_tokens=5)
        again = run(experts, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_an_abandoned_step_leaves_nothing_behind() -> None:
    store = store_of({5})
    with prefill(store, 3, cpu_s=1.5) as experts:
        experts.begin_step(T)
        experts.launch(0, *step(3), lambda ids, counts_E: None)  # its result is never taken
        assert experts._ahead
        check(store, experts, seed=4)


def test_the_cpu_and_the_ring_share_the_work() -> None:
    store = store_of(set())
    with prefill(store, 4, cpu_s=1.0) as experts:
        experts.begin_step(T)
        _, ids_TK, _ = step(1)
        counts_E = np.bincount(ids_TK.cpu().numpy().ravel(), minlength=E)
        cpu_rows, work = experts._divide(experts._layers[0], counts_E)
        chosen = int((counts_E > 0).sum())
        assert 0 < len(cpu_rows) < chosen and len(cpu_rows) + len(work.own_rows) == chosen
        assert max(counts_E[cpu_rows]) <= min(counts_E[list(work.own_rows)])
        assert 0 < len(work.next_rows) <= 3

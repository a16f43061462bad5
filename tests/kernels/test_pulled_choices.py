"""Dividing a step's cold experts between the device and the workers: every choice has one owner.

T tokens, K choices, E experts, N counts.
"""

from itertools import product

import pytest
import torch
from expert_case import make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE, max_error
from torch import Tensor

from gpu_kernels.expert_decode import DecodeWorkspace, expert_decode
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer, PackedWeights
from gpu_kernels.hand_over import ColdWork, Pulls, publish, publish_reference

HIDDEN = 16


def host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77, dtype=dtype, pin_memory=DEVICE == "cuda")


def make_step(seed: int, num_tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, ...]:
    """Ids, slots and a table of any shares; few experts, so that tokens share them."""
    rng = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :top_k].int()
    slot_E = torch.randint(-2, 2, (num_experts,), generator=rng, dtype=torch.int32)
    size = min(num_tokens * top_k, num_experts) + 1
    counts_N = (torch.rand(size, generator=rng) * (torch.arange(size) + 1)).int()
    return ids_TK.contiguous().to(DEVICE), slot_E.to(DEVICE), counts_N.to(DEVICE)


def run(
    ids_TK: Tensor, slot_E: Tensor, counts_N: Tensor, num_used: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ids that are kept, the workers' and the pulled ones, on the host."""
    shape = ids_TK.shape
    cold = ColdWork(
        host((shape[0], HIDDEN), torch.float32),
        host(shape, torch.int32),
        host(shape, torch.float32),
    )
    pulls = Pulls(counts_N, torch.full(shape, 77, dtype=torch.int32, device=DEVICE))
    used = torch.tensor([num_used], dtype=torch.int32, device=DEVICE)
    x_TH = torch.ones(shape[0], HIDDEN, device=DEVICE)
    weights_TK = torch.ones(shape, device=DEVICE)
    record_TK = host(shape, torch.int32)
    kept_TK = publish(x_TH, ids_TK, weights_TK, slot_E, used, record_TK, cold, pulls=pulls)
    kept_TK, pulled_TK = kept_TK.cpu(), pulls.ids_TK.cpu()  # waits for the stream
    assert torch.equal(record_TK, kept_TK)
    return kept_TK, cold.ids_TK, pulled_TK


def check(seed: int, num_tokens: int, num_used: int, top_k: int, num_experts: int) -> None:
    ids_TK, slot_E, counts_N = make_step(seed, num_tokens, top_k, num_experts)
    found = run(ids_TK, slot_E, counts_N, num_used)
    wanted = publish_reference(*(t.cpu() for t in (ids_TK, slot_E)), num_used, counts_N.cpu())
    assert all(map(torch.equal, found, wanted))
    owners_of(ids_TK.tolist(), slot_E.tolist(), counts_N.tolist(), num_used, *found)


def owners_of(
    ids: list[list[int]],
    slots: list[int],
    counts: list[int],
    num_used: int,
    kept_TK: Tensor,
    cold_TK: Tensor,
    pulled_TK: Tensor,
) -> None:
    """Brute force: each choice in use has one owner, and an expert the same one everywhere."""
    pulled, on_cpu, order = set(), set(), []
    for t, k in product(range(len(ids)), range(len(ids[0]))):
        kept, cold, pull = (int(owner[t, k]) for owner in (kept_TK, cold_TK, pulled_TK))
        expert = ids[t][k]
        if t >= num_used:
            assert kept == cold == pull == -1
        elif slots[expert] >= 0:
            assert (kept, cold, pull) == (expert, -1, -1)
        else:
            assert kept == expert and sorted((cold, pull)) == [-1, expert]
            (pulled if pull == expert else on_cpu).add(expert)
            order += [] if expert in order else [expert]
    assert not pulled & on_cpu and len(pulled) == counts[len(order)]
    assert order[len(order) - len(pulled) :] == [e for e in order if e in pulled]


@pytest.mark.parametrize("num_tokens", range(1, 9))
def test_every_choice_has_one_owner(num_tokens: int) -> None:
    for num_used in {num_tokens, num_tokens - 1, 0}:
        check(num_tokens, num_tokens, num_used, top_k=3, num_experts=11)


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.integers(1, 32), st.integers(0, 33), st.integers(1, 8), st.data())
def test_of_any_step(
    seed: int, num_tokens: int, num_used: int, top_k: int, data: st.DataObject
) -> None:
    num_experts = data.draw(st.integers(top_k, 200))
    check(seed, num_tokens, min(num_used, num_tokens), top_k, num_experts)


@pytest.mark.parametrize("count", range(9))
def test_the_last_that_appear_are_pulled(count: int) -> None:
    ids_TK = torch.tensor([[3, 1, 7, 0], [1, 5, 3, 2], [6, 4, 0, 7]], dtype=torch.int32)
    slot_E = torch.full((8,), -1, dtype=torch.int32)
    slot_E[7] = 0
    counts_N = torch.full((9,), count, dtype=torch.int32).minimum(torch.arange(9).int())
    step = (t.to(DEVICE) for t in (ids_TK, slot_E, counts_N))
    _, cold_TK, pulled_TK = run(*step, num_used=2)  # type: ignore[misc]
    order = [3, 1, 0, 5, 2]
    kept = max(len(order) - count, 0)
    assert set(pulled_TK.flatten().tolist()) - {-1} == set(order[kept:])
    assert set(cold_TK.flatten().tolist()) - {-1} == set(order[:kept])


def host_layer(layer: ExpertLayer) -> ExpertLayer:
    """The same weights in (mapped) host memory, read by the device."""
    weights = layer.weights
    if isinstance(weights, DenseWeights):
        rows = DenseWeights(on_host(weights.w13_SFH), on_host(weights.w2_SHI))
        return ExpertLayer(rows, layer.activation, reader=layer.device)
    packed = PackedWeights(on_host(weights.blob_SB), weights.layout)
    return ExpertLayer(packed, layer.activation, reader=layer.device)


def on_host(weights: Tensor) -> Tensor:
    copied = weights.cpu().clone()
    return copied.pin_memory() if DEVICE == "cuda" else copied


@pytest.mark.parametrize("kind", ["dense", "w4g32z", "w8g64"])
def test_a_layer_in_host_memory_gives_the_same_bits(kind: str) -> None:
    case = make_case(kind, num_tokens=4, hidden=40, width=24)
    layer = host_layer(case.layer)
    assert layer.device == case.x_TH.device
    workspace = DecodeWorkspace.make(layer, 8, torch.float32)
    found = expert_decode(*case.step, layer, workspace=workspace)
    assert torch.equal(found, case.run(expert_decode))
    assert max_error(found, case.expected()) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dense", "w4g128", "w8g128z-bf16"])
def test_host_memory_is_read_at_the_speed_of_the_link(kind: str, dtype: torch.dtype) -> None:
    sizes = {"hidden": 2048, "width": 768, "num_slots": 8, "num_experts": 8}
    case = make_case(kind, num_tokens=1, top_k=8, dtype=dtype, **sizes)
    case.ids_TK.copy_(torch.arange(8))
    layer = host_layer(case.layer)
    workspace = DecodeWorkspace.make(layer, 8, dtype)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(4):
        begin.record()
        for _ in range(10):
            found = expert_decode(*case.step, layer, workspace=workspace)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e4)
    assert torch.equal(found, case.run(expert_decode))
    each = 3 * 2048 * 768 * dtype.itemsize
    if isinstance(layer.weights, PackedWeights):
        each = layer.weights.layout.expert_bytes
    num_bytes = 8 * each
    print(f"{kind} {dtype}: {num_bytes / min(seconds) / 1e9:.1f} GB/s from host memory")
    assert num_bytes / min(seconds) > 5e9  # far below any link: a sign of something wrong


@pytest.mark.gpu
def test_a_graph_follows_ids_and_counts() -> None:
    ids_TK, slot_E, counts_N = make_step(3, 4, 8, 128)
    static = ids_TK.clone(), slot_E.clone(), counts_N.clone()
    shape = ids_TK.shape
    cold = ColdWork(
        host((4, HIDDEN), torch.float32), host(shape, torch.int32), host(shape, torch.float32)
    )
    pulls = Pulls(static[2], torch.empty(shape, dtype=torch.int32, device=DEVICE))
    used = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    x_TH, weights_TK = torch.ones(4, HIDDEN, device=DEVICE), torch.ones(shape, device=DEVICE)
    record_TK = host(shape, torch.int32)

    def step() -> Tensor:
        return publish(x_TH, *static[:1], weights_TK, static[1], used, record_TK, cold, pulls=pulls)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept_TK = step()
    for seed in range(20):
        fresh = make_step(seed, 4, 8, 128)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        used.fill_(seed % 5)
        graph.replay()
        found = kept_TK.cpu(), cold.ids_TK, pulls.ids_TK.cpu()
        wanted = publish_reference(fresh[0].cpu(), fresh[1].cpu(), seed % 5, fresh[2].cpu())
        assert all(map(torch.equal, found, wanted)), seed

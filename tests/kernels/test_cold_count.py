"""What the device is to pull of a step's cold experts: all of them, from a row that n decides.

T tokens, K choices, E experts, N counts.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE
from torch import Tensor

from gpu_kernels.cold_count import count_cold_reference
from gpu_kernels.hand_over import ColdWork, Pulls, publish, publish_reference

HIDDEN = 16


def host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77, dtype=dtype, pin_memory=DEVICE == "cuda")


def make_step(seed: int, num_tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, ...]:
    """Ids, slots and a table without equal entries; few experts, so that tokens share them."""
    rng = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :top_k].int()
    slot_E = torch.randint(-2, 2, (num_experts,), generator=rng, dtype=torch.int32)
    kept_N = 1000 - torch.arange(num_experts + 1, dtype=torch.int32)
    return ids_TK.contiguous().to(DEVICE), slot_E.to(DEVICE), kept_N.to(DEVICE)


class Publishing:
    """One step's buffers."""

    def __init__(self, ids_TK: Tensor, slot_E: Tensor, kept_N: Tensor) -> None:
        shape = ids_TK.shape
        self.ids_TK, self.slot_E = ids_TK, slot_E
        self.cold = ColdWork(
            host((shape[0], HIDDEN), torch.float32),
            host(shape, torch.int32),
            host(shape, torch.float32),
        )
        pulled_TK = torch.full(shape, 77, dtype=torch.int32, device=DEVICE)
        first_row = torch.full((1,), 77, dtype=torch.int32, device=DEVICE)
        self.pulls = Pulls(kept_N, pulled_TK, first_row)
        self.used = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.x_TH = torch.ones(shape[0], HIDDEN, device=DEVICE)
        self.weights_TK = torch.ones(shape, device=DEVICE)
        self.record_TK = host(shape, torch.int32)

    def publish(self) -> Tensor:
        step = self.x_TH, self.ids_TK, self.weights_TK, self.slot_E, self.used, self.record_TK
        return publish(*step, self.cold, pulls=self.pulls)

    def check(self, used_TK: Tensor, num_used: int) -> None:
        """After ``publish``."""
        found_TK, pulled_TK = used_TK.cpu(), self.pulls.ids_TK.cpu()  # waits for the stream
        ids_TK, slot_E, kept_N = (t.cpu() for t in (self.ids_TK, self.slot_E, self.pulls.kept_N))
        wanted_TK, cold_TK, first_row = publish_reference(ids_TK, slot_E, num_used, kept_N)
        assert torch.equal(found_TK, wanted_TK) and torch.equal(self.record_TK, wanted_TK)
        assert torch.equal(self.cold.ids_TK, cold_TK) and torch.equal(pulled_TK, cold_TK)
        assert int(self.pulls.first_row) == first_row
        cold = {
            expert
            for row in ids_TK[:num_used].tolist()
            for expert in row
            if slot_E[expert].item() < 0
        }
        assert first_row == int(kept_N[len(cold)])
        assert count_cold_reference(ids_TK, slot_E, num_used) == len(cold)


def check(seed: int, num_tokens: int, num_used: int, top_k: int, num_experts: int) -> None:
    step = Publishing(*make_step(seed, num_tokens, top_k, num_experts))
    step.used.fill_(num_used)
    step.check(step.publish(), num_used)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 32])
def test_all_cold_experts_are_counted_once(num_tokens: int) -> None:
    for num_used in {num_tokens, num_tokens - 1, 0}:
        check(num_tokens, num_tokens, num_used, top_k=3, num_experts=11)


def test_the_largest_step() -> None:
    check(0, 32, 31, top_k=16, num_experts=512)


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.integers(1, 32), st.integers(0, 33), st.integers(1, 8), st.data())
def test_of_any_step(
    seed: int, num_tokens: int, num_used: int, top_k: int, data: st.DataObject
) -> None:
    num_experts = data.draw(st.integers(top_k, 200))
    check(seed, num_tokens, min(num_used, num_tokens), top_k, num_experts)


@pytest.mark.gpu
def test_a_graph_follows_ids_and_table() -> None:
    step = Publishing(*make_step(3, 4, 8, 128))
    step.publish()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        used_TK = step.publish()
    for seed in range(20):
        fresh = make_step(seed, 4, 8, 128)
        for old, new in zip((step.ids_TK, step.slot_E, step.pulls.kept_N), fresh, strict=True):
            old.copy_(new)
        step.used.fill_(seed % 5)
        graph.replay()
        step.check(used_TK, seed % 5)


@pytest.mark.gpu
def test_what_counting_costs() -> None:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for num_tokens, top_k, num_experts in ((1, 8, 128), (4, 8, 128), (32, 8, 128), (32, 16, 512)):
        step = Publishing(*make_step(0, num_tokens, top_k, num_experts))
        step.used.fill_(num_tokens)
        step.publish()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(50):
                step.publish()
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        us = begin.elapsed_time(end) * 20
        print(f"{num_tokens} x {top_k} of {num_experts}: {us:.1f} us a publish")
        assert us < 100

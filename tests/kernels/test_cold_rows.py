"""What the device is to pull of a step's cold experts: end to end, the rows behind the workers'.

T tokens, K choices, E experts, N counts.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_batch import DEVICE
from torch import Tensor

from gpu_kernels.cold_rows import first_rows_reference
from gpu_kernels.hand_over import ColdWork, Pulls, publish, publish_reference

HIDDEN, WIDTH = 16, 100


class Inputs(NamedTuple):
    """What changes from step to step."""

    ids_TK: Tensor
    slot_E: Tensor
    place_E: Tensor
    kept_N: Tensor


def host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 77, dtype=dtype, pin_memory=DEVICE == "cuda")


def make_step(seed: int, num_tokens: int, top_k: int, num_experts: int) -> Inputs:
    """Few experts, so that tokens share them; residents have no place, others any one."""
    rng = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :top_k].int()
    slot_E = torch.randint(-2, 2, (num_experts,), generator=rng, dtype=torch.int32)
    place_E = torch.randperm(num_experts, generator=rng).int().masked_fill(slot_E >= 0, -1)
    count_N = torch.arange(num_experts + 1)
    kept_N = (torch.rand(num_experts + 1, generator=rng) * count_N * WIDTH).int()
    step = Inputs(ids_TK.contiguous(), slot_E, place_E, kept_N)
    return Inputs(*(tensor.to(DEVICE) for tensor in step))


class Publishing:
    """One step's buffers."""

    def __init__(self, inputs: Inputs) -> None:
        shape = inputs.ids_TK.shape
        self.inputs = inputs
        self.cold = ColdWork(
            host((shape[0], HIDDEN), torch.float32),
            host(shape, torch.int32),
            host(shape, torch.float32),
        )
        pulled_TK, first_TK = torch.full((2, *shape), 77, dtype=torch.int32, device=DEVICE)
        self.pulls = Pulls(inputs.kept_N, inputs.place_E, WIDTH, pulled_TK, first_TK)
        self.used = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.x_TH = torch.ones(shape[0], HIDDEN, device=DEVICE)
        self.weights_TK = torch.ones(shape, device=DEVICE)
        self.record_TK = host(shape, torch.int32)

    def publish(self) -> Tensor:
        ids_TK, slot_E = self.inputs.ids_TK, self.inputs.slot_E
        step = self.x_TH, ids_TK, self.weights_TK, slot_E, self.used, self.record_TK
        return publish(*step, self.cold, pulls=self.pulls)

    def check(self, used_TK: Tensor, num_used: int) -> None:
        """After ``publish``."""
        found_TK, pulled_TK = used_TK.cpu(), self.pulls.ids_TK.cpu()  # waits for the stream
        ids_TK, slot_E, place_E, kept_N = (tensor.cpu() for tensor in self.inputs)
        wanted_TK, cold_TK = publish_reference(ids_TK, slot_E, num_used)
        assert torch.equal(found_TK, wanted_TK) and torch.equal(self.record_TK, wanted_TK)
        assert torch.equal(self.cold.ids_TK, cold_TK) and torch.equal(pulled_TK, cold_TK)
        first_TK = self.pulls.first_TK.cpu()
        reference_TK = first_rows_reference(cold_TK, place_E, kept_N, WIDTH, num_used)
        is_cold_TK = cold_TK >= 0
        assert torch.equal(first_TK[is_cold_TK], reference_TK[is_cold_TK])
        self.check_rows(cold_TK, first_TK, kept_N)

    def check_rows(self, cold_TK: Tensor, first_TK: Tensor, kept_N: Tensor) -> None:
        """Of all rows end to end the device has those that the workers have not."""
        pairs = zip(cold_TK.flatten().tolist(), first_TK.flatten().tolist(), strict=True)
        first = {expert: row for expert, row in pairs if expert >= 0}
        assert sum(first.values()) == int(kept_N[len(first)])
        assert sum(0 < row < WIDTH for row in first.values()) <= 1


def check(seed: int, num_tokens: int, num_used: int, top_k: int, num_experts: int) -> None:
    step = Publishing(make_step(seed, num_tokens, top_k, num_experts))
    step.used.fill_(num_used)
    step.check(step.publish(), num_used)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 32])
def test_every_cold_row_is_somebodys(num_tokens: int) -> None:
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
    step = Publishing(make_step(3, 4, 8, 128))
    step.publish()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        used_TK = step.publish()
    for seed in range(20):
        fresh = make_step(seed, 4, 8, 128)
        for old, new in zip(step.inputs, fresh, strict=True):
            old.copy_(new)
        step.used.fill_(seed % 5)
        graph.replay()
        step.check(used_TK, seed % 5)


@pytest.mark.gpu
@pytest.mark.alone
def test_what_publishing_costs() -> None:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for num_tokens, top_k, num_experts in ((1, 8, 128), (4, 8, 128), (32, 8, 128), (32, 16, 512)):
        step = Publishing(make_step(0, num_tokens, top_k, num_experts))
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

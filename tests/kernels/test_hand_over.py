"""Publishing a layer's cold work and collecting it, against plain torch.

On a GPU the CPU's side is pinned memory, as it is in use.
"""

import time

import pytest
import torch
from paged_batch import DEVICE, max_error
from torch import Tensor

from gpu_kernels.bell import answer
from gpu_kernels.hand_over import (
    ColdWork,
    collect,
    collect_reference,
    publish,
    publish_reference,
)
from gpu_kernels.host_words import Bell, Ring
from gpu_kernels.rmsnorm import add_rms_norm

EPS = 1e-6
UNTOUCHED = 77
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # interpreted bf16 is cut, not rounded
DTYPES = [torch.float32, HALF]


def host(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, UNTOUCHED, dtype=dtype, pin_memory=DEVICE == "cuda")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "num_used", "top_k", "hidden"),
    [(1, 1, 8, 64), (4, 3, 2, 100), (8, 0, 3, 64), (2, 2, 4, 2500)],
)
def test_publish(num_tokens: int, num_used: int, top_k: int, hidden: int, dtype: torch.dtype):
    num_experts = 12
    rng = torch.Generator().manual_seed(num_tokens)
    x_TH = torch.randn(num_tokens, hidden, generator=rng).to(DEVICE, dtype)
    ids_TK = torch.rand(num_tokens, num_experts, generator=rng).argsort(1)[:, :top_k].int()
    ids_TK = ids_TK.contiguous().to(DEVICE)
    weights_TK = torch.rand(num_tokens, top_k, generator=rng).to(DEVICE)
    slot_E = torch.randint(-2, 2, (num_experts,), generator=rng, dtype=torch.int32).to(DEVICE)
    used = torch.tensor([num_used], dtype=torch.int32, device=DEVICE)
    record_TK = host((num_tokens, top_k), torch.int32)
    cold = ColdWork(
        host((num_tokens, hidden)),
        host((num_tokens, top_k), torch.int32),
        host((num_tokens, top_k)),
        Ring(host((1,), torch.int64)),
    )
    kept_TK = publish(x_TH, ids_TK, weights_TK, slot_E, used, record_TK, cold)
    synchronize()
    wanted_TK, cold_TK = publish_reference(ids_TK, slot_E, num_used)
    assert torch.equal(kept_TK, wanted_TK) and torch.equal(record_TK, wanted_TK.cpu())
    assert cold.ring is not None and cold.ring.clear.item() == 0
    assert torch.equal(cold.ids_TK, cold_TK.cpu())
    assert torch.equal(cold.x_TH[:num_used], x_TH[:num_used].float().cpu())
    assert cold.x_TH[num_used:].eq(UNTOUCHED).all()
    assert torch.equal(cold.weights_TK[:num_used], weights_TK[:num_used].cpu())


def test_a_layer_without_cold_experts_is_recorded_only() -> None:
    ids_TK = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device=DEVICE)
    slot_E = torch.arange(4, dtype=torch.int32, device=DEVICE)
    record_TK = host((2, 2), torch.int32)
    x_TH, weights_TK = torch.ones(2, 8, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    one = torch.ones(1, dtype=torch.int32, device=DEVICE)
    kept_TK = publish(x_TH, ids_TK, weights_TK, slot_E, one, record_TK, None)
    synchronize()
    assert kept_TK.tolist() == record_TK.tolist() == [[3, 1], [-1, -1]]


def make_parts(num_tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(hidden)
    hot, cold, shared, residual = torch.randn(4, num_tokens, hidden, generator=rng)
    norm_H = 1 + 0.3 * torch.randn(hidden, generator=rng)
    host_cold = host((num_tokens, hidden)).copy_(cold)
    on_device = (shared.to(DEVICE, dtype), residual.to(DEVICE, dtype), norm_H.to(DEVICE, dtype))
    return (hot.to(DEVICE), host_cold, *on_device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (3, 100), (0, 64), (2, 2048)])
@pytest.mark.parametrize("has_shared", [False, True])
def test_collect(num_tokens: int, hidden: int, has_shared: bool, dtype: torch.dtype) -> None:
    hot, cold, shared, residual, norm_H = make_parts(num_tokens, hidden, dtype)
    extra = shared if has_shared else None
    pulled = torch.full_like(hot, 0.3)
    for parts in ((hot,), (cold,), (hot, cold), (hot, pulled, cold)):
        normed, summed = collect(residual, parts, extra, norm_H, EPS)
        wanted_normed, wanted_sum = collect_reference(residual, parts, extra, norm_H, EPS)
        assert torch.equal(summed, wanted_sum)  # to the bit
        assert normed.dtype == dtype
        if num_tokens:
            largest = float(wanted_normed.abs().max())
            assert max_error(normed, wanted_normed) <= 4 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_add_rms_norm(dtype: torch.dtype) -> None:
    hot, _, _, residual, norm_H = make_parts(3, 256, dtype)
    for ours, theirs in zip(
        collect(residual, (hot,), None, norm_H, EPS),
        add_rms_norm(hot.to(dtype), residual, norm_H, EPS),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("first", [0, 1])
def test_two_parts_are_as_good_as_their_sum(first: int) -> None:
    """Which is how a part that was added elsewhere equals one that was not."""
    parts = make_parts(4, 512, HALF)
    hot, cold, shared, residual, norm_H = parts
    pair = (hot, cold) if first == 0 else (cold, hot)
    together = (hot + cold.to(DEVICE),)
    found = collect(residual, pair, shared, norm_H, EPS)
    assert all(map(torch.equal, found, collect(residual, together, shared, norm_H, EPS)))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [2048, 4096])
def test_both_in_a_graph(hidden: int) -> None:
    """What a replay reads and writes is what pinned memory holds then."""
    hot, cold, shared, residual, norm_H = make_parts(4, hidden, torch.bfloat16)
    ids_TK = torch.arange(8, dtype=torch.int32, device=DEVICE).view(4, 2)
    slot_E = torch.full((8,), -1, dtype=torch.int32, device=DEVICE)
    used = torch.full((1,), 4, dtype=torch.int32, device=DEVICE)
    work = ColdWork(host((4, hidden)), host((4, 2), torch.int32), host((4, 2)))
    record_TK = host((4, 2), torch.int32)
    weights_TK = torch.rand(4, 2, device=DEVICE)

    def step() -> tuple[Tensor, Tensor]:
        publish(residual, ids_TK, weights_TK, slot_E, used, record_TK, work)
        return collect(residual, (hot, cold), shared, norm_H, EPS)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        normed, summed = step()
    for n in range(3):
        cold.normal_()
        residual.normal_()
        used.fill_(n + 1)
        graph.replay()
        torch.cuda.synchronize()
        wanted_normed, wanted = collect_reference(residual, (hot, cold), shared, norm_H, EPS)
        assert torch.equal(summed, wanted)
        assert is_rounded(normed, wanted_normed)
        assert torch.equal(work.x_TH[: n + 1], residual[: n + 1].float().cpu())
        assert record_TK.eq(-1).all(dim=1).tolist() == [False] * (n + 1) + [True] * (3 - n)


def is_rounded(normed: Tensor, wanted: Tensor) -> bool:
    """Whether every number is within two roundings of bf16 of what float32 has."""
    return torch.allclose(normed.float(), wanted, rtol=2**-7, atol=1e-6)


def wait_until(word: Tensor, number: int) -> None:
    """Look at a word that the device stores to; five seconds are long for it."""
    deadline = time.monotonic() + 5
    while word.item() != number:
        assert time.monotonic() < deadline, f"{word.item()} instead of {number}"


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 2048), (1, 4096), (7, 2880), (32, 2048)])
def test_kernels_ring_and_wait(num_tokens: int, hidden: int) -> None:
    """The host answers as the workers do, late, with what it found when the bell rang."""
    hot, cold, shared, residual, norm_H = make_parts(num_tokens, hidden, torch.bfloat16)
    ids_TK = torch.arange(num_tokens * 2, dtype=torch.int32, device=DEVICE).view(-1, 2)
    slot_E = torch.full((num_tokens * 2,), -1, dtype=torch.int32, device=DEVICE)
    used = torch.full((1,), num_tokens, dtype=torch.int32, device=DEVICE)
    weights_TK = torch.rand(num_tokens, 2, device=DEVICE)
    words = host((64,), torch.int64).zero_()
    doorbell, done_bell = words[:1], words[32:33]
    num_done = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    host_x, host_weights = host((num_tokens, hidden)), host((num_tokens, 2))
    host_ids, record_TK = host((num_tokens, 2), torch.int32), host((num_tokens, 2), torch.int32)

    def layer(number: int) -> tuple[Tensor, Tensor]:
        ring = Ring(done_bell, Bell(doorbell, number), num_done)
        work = ColdWork(host_x, host_ids, host_weights, ring)
        publish(residual, ids_TK, weights_TK, slot_E, used, record_TK, work)
        late = Bell(done_bell, number)
        return collect(residual, (hot, cold), shared, norm_H, EPS, late=late)

    for number in range(1, 40):
        residual.normal_()
        wanted_ids, wanted_x, wanted_weights = (t.cpu() for t in (ids_TK, residual, weights_TK))
        for published in (host_x, host_ids, host_weights):
            published.fill_(UNTOUCHED)
        done_bell.fill_(number - 1)
        doorbell.zero_()
        normed, summed = layer(number)
        try:
            ended = torch.cuda.current_stream().record_event()
            wait_until(doorbell, number)
            assert done_bell.item() == 0 and not ended.query()
            assert torch.equal(host_ids, wanted_ids)
            assert torch.equal(host_x, wanted_x.float())
            assert torch.equal(host_weights, wanted_weights)
            cold.copy_(host_x * 0.5)
            assert not ended.query()
        finally:
            done_bell.fill_(number)  # or the kernel would look for ever
        torch.cuda.synchronize()
        wanted_normed, wanted = collect_reference(residual, (hot, cold), shared, norm_H, EPS)
        assert torch.equal(summed, wanted) and is_rounded(normed, wanted_normed)
        assert num_done.item() == 0


@pytest.mark.gpu
def test_a_graph_is_answered_at_every_replay() -> None:
    words = host((64,), torch.int64).zero_()
    asked, answered = words[:1], words[32:33]
    answer(Bell(answered, 0), Bell(asked, 0))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    numbers = (3, 16, 1)
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for number in numbers:
            answer(Bell(asked, number), Bell(answered, number))
    for _ in range(5):
        graph.replay()
        try:
            for number in numbers:
                asked.fill_(number)
                wait_until(answered, number)
        finally:
            while not torch.cuda.current_stream().query():
                for number in numbers:
                    asked.fill_(number)
                    time.sleep(0.001)

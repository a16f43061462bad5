"""One layer of real size after another on a GPU: the same sums however cold experts are shared.

Run with ``-s`` for what each share costs: the best count for n experts is what the table
(:mod:`offload.cold_share`) should say.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.thread_count import measured_num_threads
from offload.cold_share import ShareCosts, pull_counts
from offload.decode_experts import DecodeExperts
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore
from offload.handoff import make_hand_off, pinned_words
from offload.handoff_probe import choose_way, probe
from offload.placement import Placement

pytestmark = pytest.mark.gpu
TIMES = 5


@dataclass(frozen=True)
class Token:
    """What one token brings to a layer."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True)
class Layers:
    """Two layers without residents, what computes them, and tokens for layer 0, 1, 0, 1, ..."""

    store: ExpertStore
    experts: DecodeExperts
    tokens: list[Token]
    used: torch.Tensor

    def set_count(self, count: int) -> None:
        """Let the device pull so many of a token's experts."""
        pulled = self.experts.pulled
        assert pulled is not None and sorted(pulled.layers) == [0, 1], "not pinned?"
        pulled._host_counts_N[:] = [min(n, count) for n in range(len(pulled._host_counts_N))]
        pulled._counts_N.copy_(torch.from_numpy(pulled._host_counts_N))

    def compute(self) -> list[torch.Tensor]:
        """Every token's sum, on the current stream."""
        found, step = [], self.experts.step(1, self.used)
        for n, token in enumerate(self.tokens):
            parts = step.launch(n % 2, token.x_TH, token.ids_TK, token.weights_TK).parts()
            total_TH = torch.zeros(token.x_TH.shape, device="cuda")
            for part in parts:
                total_TH += part.to("cuda", non_blocking=True)
            found.append(total_TH)
        return found

    def run(self) -> tuple[list[float], list[torch.Tensor]]:
        """Seconds of a layer in a graph, several times, and every token's sum."""
        self.experts.bind(1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def warm_up() -> None:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.compute()

        self.experts.run_stream(warm_up, stream.query)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found = self.compute()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> None:
            begin.record()
            graph.replay()
            end.record()

        seconds = []
        for _ in range(TIMES):
            self.experts.run_stream(replay, torch.cuda.current_stream().query)
            seconds.append(begin.elapsed_time(end) / 1e3 / len(self.tokens))
        return seconds, [total_TH.clone() for total_TH in found]


def make_token(shape: ExpertShape, top_k: int, seed: int) -> Token:
    rng = torch.Generator().manual_seed(seed)
    ids_K = torch.randperm(shape.num_experts, generator=rng)[:top_k]
    return Token(
        torch.randn(1, shape.hidden_size, generator=rng).cuda().bfloat16(),
        ids_K.int().cuda()[None],
        torch.full((1, top_k), 1 / top_k, device="cuda"),
    )


@pytest.fixture(params=["qwen", "mixtral"])
def layers(request: pytest.FixtureRequest) -> Iterator[Layers]:
    num_experts, top_k, hidden, width = (
        (64, 8, 2048, 768) if request.param == "qwen" else (4, 2, 4096, 14336)
    )
    shape = ExpertShape(
        num_layers=2,
        moe_layers=(0, 1),
        num_experts=num_experts,
        hidden_size=hidden,
        expert_size=width,
    )
    device, dtype = torch.device("cuda"), torch.bfloat16
    store = ExpertStore(shape, Placement.of([(), ()]), device=device, dtype=dtype)

    def fill(layer: int, expert: int, w13_FH: torch.Tensor, w2_HI: torch.Tensor) -> None:
        rng = torch.Generator(device).manual_seed(100 * layer + expert)
        for weights in (w13_FH, w2_HI):
            drawn = torch.randn(weights.shape, generator=rng, device=device)
            weights.copy_((drawn * weights.shape[1] ** -0.5).to(dtype))

    store.fill(fill, num_threads=1)
    way = choose_way(probe(), None)
    assert way != "eager", probe().problems
    with ExpertPool(measured_num_threads(), words=pinned_words(), caller_works=False) as pool:
        hybrid = HybridExperts(store, pool, device=device, max_tokens=8, top_k=top_k)
        experts = DecodeExperts(
            hybrid,
            pool.workers,
            make_hand_off(way, pool.workers),
            dtype=dtype,
            max_rows=1,
            share=ShareCosts(),
        )
        num_tokens = max(4, 2**31 // (top_k * 3 * hidden * width * 2))
        tokens = [make_token(shape, top_k, seed) for seed in range(num_tokens)]
        used = torch.ones(1, dtype=torch.int32, device=device)
        yield Layers(store, experts, tokens, used)
        torch.cuda.synchronize()
        hybrid.clear()
    store.clear()


def test_every_share_gives_the_same_sums(layers: Layers) -> None:
    shape, top_k = layers.store.shape, layers.tokens[0].ids_TK.numel()
    expert_bytes = 3 * shape.hidden_size * shape.expert_size * 2
    wanted: list[torch.Tensor] = []
    for count in range(top_k + 1):
        layers.set_count(count)
        seconds, found = layers.run()
        wanted = wanted or found  # the workers compute all
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        rate = top_k * expert_bytes / min(seconds) / 1e9
        print(
            f"{count} of {top_k} pulled: {min(seconds) * 1e6:.0f} to {max(seconds) * 1e6:.0f} us a "
            f"layer, {rate:.0f} GB/s, off by {error:.1e}"
        )
        assert error < 1e-2  # the device rounds to bf16 between its two products
    table = pull_counts(top_k, expert_bytes, ShareCosts())
    print(f"the table says {int(table[top_k])}")

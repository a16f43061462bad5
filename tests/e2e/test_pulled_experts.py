"""Layers of real size, one after the other, on a GPU: the same sums however experts are shared.

Run with ``-s`` for what each share costs: the best number of rows is what the table
(:mod:`offload.cold_share`) should say. An expert is read again only after LEAST_BYTES of others:
more than the last level of cache holds (320 MB on two sockets).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.thread_count import measured_num_threads
from gpu_kernels.hand_over import collect
from offload.cold_share import ShareCosts, kept_rows
from offload.decode_experts import DecodeExperts
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore
from offload.handoff import make_hand_off, pinned_words
from offload.handoff_probe import choose_way, probe
from offload.placement import Placement

pytestmark = pytest.mark.gpu
TIMES = 5
LEAST_BYTES = 2 * 10**9
SHAPES = {  # experts of a layer, of a token, hidden, width
    "qwen": (64, 8, 2048, 768),
    "qwen, 5 cold": (60, 5, 2048, 768),
    "mixtral": (4, 2, 4096, 14336),
    "mixtral, 1 cold": (4, 1, 4096, 14336),
}


@dataclass(frozen=True)
class Token:
    """What one token brings to a layer."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor


@dataclass(frozen=True)
class Layers:
    """Layers without residents, what computes them, and tokens, one for each layer in turn."""

    store: ExpertStore
    experts: DecodeExperts
    tokens: list[Token]
    used: torch.Tensor

    @property
    def num_layers(self) -> int:
        return self.store.shape.num_layers

    def set_rows(self, rows: int) -> None:
        """Let the device compute so many rows of a layer's cold experts."""
        pulled = self.experts.pulled
        assert pulled is not None and len(pulled.layers) == self.num_layers, "not pinned?"
        for share in pulled._shares.values():
            total_N = self.store.shape.expert_size * np.arange(len(share.host_kept_N))
            share.host_kept_N[:] = np.maximum(total_N - rows, 0)
            share.kept_N.copy_(torch.from_numpy(share.host_kept_N))

    def compute(self) -> list[torch.Tensor]:
        """Every token's sum, on the current stream."""
        found = []
        record_LTK = torch.zeros(self.experts.record_shape(1), dtype=torch.int32, device="cuda")
        step = self.experts.step(1, self.used, record_LTK)
        hidden = self.store.shape.hidden_size
        zeros_TH, norm_H = torch.zeros(1, hidden, device="cuda"), torch.ones(hidden, device="cuda")
        for n, token in enumerate(self.tokens):
            layer = n % self.num_layers
            pending = step.launch(layer, token.x_TH, token.ids_TK, token.weights_TK)
            parts = pending.parts()
            _, total_TH = collect(zeros_TH, parts, None, norm_H, 1e-6, late=pending.late)
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


def make_token(shape: ExpertShape, top_k: int, number: int) -> Token:
    """The layers' turns go through all their experts before one comes again."""
    rng = torch.Generator().manual_seed(number)
    first = number // shape.num_layers * top_k
    ids_K = torch.arange(first, first + top_k) % shape.num_experts
    return Token(
        torch.randn(1, shape.hidden_size, generator=rng).cuda().bfloat16(),
        ids_K.int().cuda()[None],
        torch.full((1, top_k), 1 / top_k, device="cuda"),
    )


@pytest.fixture(params=SHAPES)
def layers(request: pytest.FixtureRequest) -> Iterator[Layers]:
    num_experts, top_k, hidden, width = SHAPES[request.param]
    layer_bytes = num_experts * 3 * hidden * width * 2
    num_layers = max(2, -(-LEAST_BYTES // layer_bytes))
    shape = ExpertShape(
        num_layers=num_layers,
        moe_layers=tuple(range(num_layers)),
        num_experts=num_experts,
        hidden_size=hidden,
        expert_size=width,
    )
    device, dtype = torch.device("cuda"), torch.bfloat16
    placement = Placement.of([()] * num_layers)
    store = ExpertStore(shape, placement, device=device, dtype=dtype)

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
        num_tokens = num_layers * (num_experts // top_k)  # every expert once
        tokens = [make_token(shape, top_k, number) for number in range(num_tokens)]
        used = torch.ones(1, dtype=torch.int32, device=device)
        yield Layers(store, experts, tokens, used)
        torch.cuda.synchronize()
        hybrid.clear()
    store.clear()


def test_every_share_gives_the_same_sums(layers: Layers) -> None:
    shape, top_k = layers.store.shape, layers.tokens[0].ids_TK.numel()
    width = shape.expert_size
    expert_bytes = 3 * shape.hidden_size * width * 2
    total = top_k * width
    preset = total - int(kept_rows(top_k, width, expert_bytes, ShareCosts())[top_k])
    tried = {total * parts // 16 // 64 * 64 for parts in (0, 3, 4, 5, 6, 7, 8, 16)} | {preset}
    print(f"{top_k} experts of {shape.hidden_size} x {width}; the table says {preset} rows")
    wanted: list[torch.Tensor] = []
    for rows in sorted(tried):
        layers.set_rows(rows)
        seconds, found = layers.run()
        wanted = wanted or found  # the workers compute all
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        rate = top_k * expert_bytes / min(seconds) / 1e9
        print(
            f"{rows} rows pulled: {min(seconds) * 1e6:.0f} to {max(seconds) * 1e6:.0f} us a "
            f"layer, {rate:.0f} GB/s, off by {error:.1e}"
        )
        assert error < 1e-2  # the device rounds to bf16 between its two products

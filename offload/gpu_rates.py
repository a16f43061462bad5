"""Measures what a GPU does beside the CPU: reads host memory, launches kernels, hands work over.

Ordering: everything runs on torch's current stream or on a stream of its own that is awaited before
the next thing begins. Graphs are dropped before the memory that they name is given back.

Shapes: T = 1 token, H hidden, K top-k.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.threads import WorkerPool
from gpu_kernels.hand_over import collect
from gpu_kernels.host_memory import read_host
from offload.cold_share import ShareCosts
from offload.decode_experts import DecodeExperts
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore
from offload.handoff import make_hand_off, pinned_words
from offload.handoff_probe import Way, choose_way, forced_way, probe
from offload.limits import GIGA
from offload.peaks import PINNED_BYTES, filled_arena, gpu_s, read_beside
from offload.placement import Placement

RUNS = 3  # of reading side by side, 0.2 s each
KERNELS = 1000  # in one graph
REPLAYS = 20
WARM_UPS = 2
# a small model's layers: 16 x 4 experts of 9.4 MB
LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 16, 4, 2, 2048, 768


def pull_rates(free_bytes: int, num_threads: int) -> dict[str, Any]:
    """How fast kernels read pinned memory, alone and while the workers read too."""
    pinned = torch.ones(PINNED_BYTES // 4, pin_memory=True)
    target = torch.empty(PINNED_BYTES // 4, device="cuda")

    def pull() -> None:
        read_host(pinned, target)

    alone_gbps = PINNED_BYTES / gpu_s(pull) / GIGA
    with WorkerPool(num_threads) as pool:
        arena = filled_arena(free_bytes)
        runs = [read_beside(pool, arena, pull) for _ in range(RUNS)]
    cpu_bps, pull_bps = max(runs, key=sum)
    return {
        "pull_gbps": alone_gbps,
        "beside_cpu_gbps": cpu_bps / GIGA,
        "beside_pull_gbps": pull_bps / GIGA,
    }


@torch.inference_mode()
def launch_s() -> float:
    """What one more small kernel costs in a graph, each waiting for the one before."""
    x_H = torch.zeros(HIDDEN, device="cuda")

    def chain() -> None:
        for _ in range(KERNELS):
            x_H.add_(1.0)

    return _graph_s(chain, lambda work, is_done: work()) / KERNELS


def hand_over_s(num_threads: int) -> float:
    """What a layer that has a cold expert takes longer, where a step chooses resident ones only."""
    way = choose_way(probe(), forced_way())
    some_cold, none_cold = (_layers_s(way, num_threads, n) for n in (EXPERTS - 1, EXPERTS))
    return max(0.0, some_cold - none_cold) / LAYERS


def _layers_s(way: Way, num_threads: int, num_resident: int) -> float:
    """Seconds of LAYERS layers' experts for one token, whose experts are all resident."""
    device = torch.device("cuda")
    shape = ExpertShape(
        num_layers=LAYERS,
        moe_layers=range(LAYERS),
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        expert_size=WIDTH,
    )
    with ExitStack() as resources:
        pool = ExpertPool(num_threads, words=pinned_words(), caller_works=False)
        resources.callback(pool.close)
        placement = Placement.of([range(num_resident)] * LAYERS)
        store = ExpertStore(shape, placement, device=device, dtype=torch.bfloat16)
        resources.callback(store.clear)
        store.fill(_fill, num_threads=4)
        hybrid = HybridExperts(store, pool, device=device, max_tokens=1, top_k=TOP_K)
        resources.callback(hybrid.clear)
        experts = DecodeExperts(
            hybrid,
            pool.workers,
            make_hand_off(way, pool.workers),
            dtype=torch.bfloat16,
            max_rows=1,
            share=ShareCosts(),
        )
        experts.bind(1)
        with torch.inference_mode():
            chain = _chain(experts, device)
            return gpu_s(chain) if way == "eager" else _graph_s(chain, experts.run_stream)


def _chain(experts: DecodeExperts, device: torch.device) -> Callable[[], None]:
    """All layers' experts, one after the other, each added to what the one before gave."""
    num_used = torch.ones(1, dtype=torch.int32, device=device)
    record_LTK = torch.zeros(experts.record_shape(1), dtype=torch.int32, device=device)
    backend = experts.step(1, num_used, record_LTK)
    x_TH = torch.ones(1, HIDDEN, dtype=torch.bfloat16, device=device)
    norm_H = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
    ids_TK = torch.arange(TOP_K, dtype=torch.int32, device=device).unsqueeze(0)
    weights_TK = torch.full((1, TOP_K), 1 / TOP_K, device=device)

    def chain() -> None:
        y_TH = residual_TH = x_TH
        for layer in range(LAYERS):
            pending = backend.launch(layer, y_TH, ids_TK, weights_TK)
            parts = pending.parts()
            y_TH, residual_TH = collect(residual_TH, parts, None, norm_H, 1e-6, late=pending.late)

    return chain


def _fill(layer: int, expert: int, w13: torch.Tensor, w2: torch.Tensor) -> None:
    w13.zero_()
    w2.zero_()


def _graph_s(
    chain: Callable[[], None],
    run: Callable[[Callable[[], None], Callable[[], bool]], None],
) -> float:
    """Seconds of ``chain`` as a CUDA graph, the fastest of REPLAYS, after it ran twice as it is.

    ``run(work, is_done)`` calls ``work``, which puts things on a stream; it may wait for them.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())

    def warm_up() -> None:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                chain()

    run(warm_up, stream.query)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        chain()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def replay() -> None:
        begin.record()
        graph.replay()
        end.record()

    seconds: list[float] = []
    for _ in range(REPLAYS):
        run(replay, torch.cuda.current_stream().query)
        end.synchronize()
        seconds.append(float(begin.elapsed_time(end)) / 1e3)
    return min(seconds)

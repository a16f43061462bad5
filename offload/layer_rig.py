"""Layers of experts as decode steps run them, with nothing else of a model, to be timed.

Ordering: graphs are captured and replayed on a stream of their own, which is awaited before the
next thing begins. A graph is dropped before the memory that it names is given back.

Shapes: T = 1 token, H hidden, K top-k.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.weight_kind import KINDS, WeightKind
from gpu_kernels.hand_over import collect
from offload.cold_share import ShareCosts
from offload.decode_experts import DecodeExperts
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore
from offload.handoff import make_hand_off, pinned_words
from offload.handoff_probe import Way
from offload.idle_pool import IdlePool
from offload.peaks import gpu_s
from offload.placement import Placement

FILL_THREADS = 4
WARM_UPS = 2

Work = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Equal layers of ``num_experts``; the first ``num_resident`` of each lie on the GPU."""

    num_layers: int
    num_experts: int
    num_resident: int
    hidden: int
    width: int
    kind: WeightKind = KINDS["bf16"]
    activations: Activations = "f32"

    @property
    def shape(self) -> ExpertShape:
        return ExpertShape(
            num_layers=self.num_layers,
            moe_layers=range(self.num_layers),
            num_experts=self.num_experts,
            hidden_size=self.hidden,
            expert_size=self.width,
        )


@dataclass(frozen=True, slots=True)
class RigSetup:
    """Layers, how many experts of each a token chooses, and what is pulled of cold ones."""

    layers: Layers
    top_k: int
    share: ShareCosts


class LayerRig:
    """One token's step through the layers, again and again.

    It chooses the first ``top_k`` experts of each layer, or nothing.
    """

    def __init__(self, experts: DecodeExperts, layers: Layers, top_k: int, way: Way) -> None:
        self._experts = experts
        device = torch.device("cuda")
        self._num_used = torch.ones(1, dtype=torch.int32, device=device)
        chain = self._chain(layers, top_k, device)
        self._seconds: Callable[[], float]
        if way == "eager":
            self._seconds = lambda: gpu_s(chain) / layers.num_layers
        else:
            replay = timed_graph(chain, experts.run_stream)
            self._seconds = lambda: replay() / layers.num_layers

    def seconds(self) -> float:
        """Of a layer, in one step."""
        return self._seconds()

    def close(self) -> None:
        """Drop the graph."""
        del self._seconds

    def share(self, costs: ShareCosts) -> None:
        """Divide cold experts anew, with no more for the link than at first."""
        assert self._experts.pulled is not None
        self._experts.pulled.share(costs)

    def choose(self, *, nothing: bool) -> None:
        """What the next steps do."""
        self._num_used.fill_(0 if nothing else 1)
        torch.cuda.synchronize()

    def _chain(self, layers: Layers, top_k: int, device: torch.device) -> Work:
        """All layers' experts, one after the other, each added to what the one before gave."""
        record_LTK = torch.zeros(self._experts.record_shape(1), dtype=torch.int32, device=device)
        backend = self._experts.step(1, self._num_used, record_LTK)
        x_TH = torch.ones(1, layers.hidden, dtype=torch.bfloat16, device=device)
        norm_H = torch.ones(layers.hidden, dtype=torch.bfloat16, device=device)
        ids_TK = torch.arange(top_k, dtype=torch.int32, device=device)[None]
        weights_TK = torch.full((1, top_k), 1 / top_k, device=device)

        def chain() -> None:
            y_TH = residual_TH = x_TH
            for layer in range(layers.num_layers):
                pending = backend.launch(layer, y_TH, ids_TK, weights_TK)
                parts = pending.parts()
                late = pending.late
                y_TH, residual_TH = collect(residual_TH, parts, None, norm_H, 1e-6, late=late)

        return chain


def fed_pool(num_threads: int) -> ExpertPool:
    """Workers for a rig; to be closed after it."""
    return ExpertPool(num_threads, words=pinned_words(), caller_works=False)


@contextmanager
def layer_rig(setup: RigSetup, pool: ExpertPool | IdlePool, way: Way) -> Iterator[LayerRig]:
    """Allocate, fill with zeros, pin and capture; all of it is given back at the end."""
    layers, top_k = setup.layers, setup.top_k
    device, kind = torch.device("cuda"), layers.kind
    with ExitStack() as resources:
        store = ExpertStore(
            layers.shape,
            Placement.of([range(layers.num_resident)] * layers.num_layers),
            device=device,
            dtype=torch.uint8 if kind.is_packed else torch.bfloat16,
            packed=kind if kind.is_packed else None,
        )
        resources.callback(store.clear)
        store.fill(_fill, num_threads=FILL_THREADS)
        hybrid = HybridExperts(
            store, pool, device=device, max_tokens=1, top_k=top_k, activations=layers.activations
        )
        resources.callback(hybrid.clear)
        experts = DecodeExperts(
            hybrid,
            pool.workers,
            make_hand_off(way, pool.workers),
            dtype=torch.bfloat16,
            max_rows=1,
            share=setup.share,
        )
        experts.bind(1)
        resources.enter_context(torch.inference_mode())
        rig = LayerRig(experts, layers, top_k, way)
        resources.callback(rig.close)
        yield rig


def _fill(layer: int, expert: int, *parts: torch.Tensor) -> None:
    """Written, or all pages would be one page of zeros."""
    for part in parts:
        part.zero_()


def timed_graph(
    chain: Work, run: Callable[[Work, Callable[[], bool]], None]
) -> Callable[[], float]:
    """Capture ``chain`` as a CUDA graph; what is returned replays it, and says for how long.

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

    def seconds() -> float:
        run(replay, torch.cuda.current_stream().query)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return seconds

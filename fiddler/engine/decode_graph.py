"""A decode step with static shapes: the buffers of one bucket of batch sizes, and its CUDA graph.

For a token Python fills one array, replays a graph and reads the ids; the CPU workers are rung and
awaited by the graph itself. Rows beyond the requests are padding. The first step captures the
graph: twice it runs as it is, so that everything is compiled and allocated, then it is recorded.

``is_eager`` runs the same operations in the same order without a graph, with the same bits as
result; a step that is put on the stream is complete then.

Ordering: everything runs in torch's current stream but the capture, which has a stream of its own
and is awaited. All buckets share the memory of their intermediate results and the buffers of
:class:`offload.decode_experts.DecodeExperts`; steps on the stream use them one after the other.
Only copies from and to the host have two sides, one for either of two steps. What else a step gives
back is good until the next one starts.

Shapes: B rows of a bucket, R requests, H hidden, V vocabulary.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fiddler.engine.decode_staging import NUM_SIDES, DrawnIds, Results, Staging
from fiddler.engine.scheduler import Chunk
from fiddler.models.decoder import Decoder
from fiddler.models.kv_cache import LayerKV
from fiddler.models.triton_kernels import TritonKernels
from gpu_kernels.sampling import SamplingScratch, sample
from offload.decode_experts import DecodeExperts

MOST_PAGES = 65_536  # entries of a page table: 256 KB to copy each step; longer ones stay eager
WARM_UPS = 2

_log = logging.getLogger("fiddler.decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSetup:
    """What decode steps are made of. ``make_experts`` is called again after workers have failed,
    and ``renew_workers`` before it. ``settle`` ends what moves experts, between steps.
    ``workers_failed``: whether those in use have to be renewed.
    """

    decoder: Decoder
    kernels: TritonKernels
    kv_caches: list[LayerKV]
    dtype: torch.dtype  # of the hidden states
    make_experts: Callable[[], DecodeExperts]
    renew_workers: Callable[[], None]
    workers_failed: Callable[[], bool]
    settle: Callable[[], None]
    page_size: int
    max_num_seqs: int
    pages_per_request: int
    is_eager: bool


@dataclass(frozen=True, slots=True)
class Decoded:
    """Results of one step; ``drawn_ids``: -1 where logits are not finite.

    The others are good until the next step starts.
    """

    hidden_RH: torch.Tensor
    logits_RV: torch.Tensor
    drawn_ids: list[int]


class SharedBuffers:
    """What all buckets use."""

    def __init__(self, setup: DecodeSetup, largest: int) -> None:
        config = setup.decoder.config
        self.device = setup.kv_caches[0].pages.device
        self.experts = setup.make_experts()
        self.hidden_BH = torch.zeros(
            largest, config.hidden_size, dtype=setup.dtype, device=self.device
        )
        self.logits_BV = torch.zeros(largest, config.vocab_size, device=self.device)
        self.scratch = SamplingScratch.for_batch(largest, config.vocab_size, self.device)
        if not setup.is_eager:
            self.stream = _capture_stream()
            self.memory = torch.cuda.graph_pool_handle()

    def wait(self, event: "torch.cuda.Event | None" = None) -> None:
        """Until the stream has passed ``event``, or is idle; as DecodeExperts.await_step."""
        if self.device.type == "cuda":
            is_idle = torch.cuda.current_stream().query
            self.experts.await_step(is_idle if event is None else event.query, is_idle)


class Bucket:
    """One number of rows: its static buffers and, after the first step, its graph."""

    def __init__(
        self, setup: DecodeSetup, shared: SharedBuffers, num_rows: int, is_drawn: bool
    ) -> None:
        max_pages = min(num_rows * setup.pages_per_request, MOST_PAGES)
        self.staging = Staging(num_rows, max_pages, setup.page_size, shared.device)
        self._shared, self._num_rows, self._is_eager = shared, num_rows, setup.is_eager
        self._drawn = DrawnIds(setup.decoder.config, num_rows, shared.device) if is_drawn else None
        self._batch, self._draws = self.staging.batch(), self.staging.draws()
        if self._drawn is not None:
            self._batch = replace(self._batch, drawn_LTK=self._drawn.device_LBK)
        self._results = Results(shared.experts.record_shape(num_rows), shared.device)
        experts = shared.experts.step(num_rows, self.staging.num_used, self._results.record_LBK)
        self._decoder = setup.decoder.plugged(setup.kernels.copy(), experts)
        self._kv_caches = setup.kv_caches
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ends = [_event(shared.device) for _ in range(NUM_SIDES)]

    @property
    def must_move(self) -> bool:
        """Whether experts are to change places before another step."""
        return self._shared.experts.must_move

    @torch.inference_mode()
    def prepare(self) -> None:
        """Before a step that none is under way with: experts move, and a graph is made."""
        experts = self._shared.experts
        experts.move_experts()
        experts.bind(self._num_rows)
        if not self._is_eager and self._graph is None:
            self._graph = self._capture()

    @torch.inference_mode()
    def put(
        self,
        chunks: Sequence[Chunk],
        drawn_LTK: np.ndarray | None,
        side: int = 0,
        *,
        is_next: bool = False,
    ) -> int:
        """Put a step on the stream; returns ``side``.

        ``is_next``: the step under way has the other side, and draws this one's tokens.
        """
        self.staging.fill(chunks, side)
        self.staging.send(side, is_next=is_next)
        if self._drawn is not None and drawn_LTK is not None:
            self._drawn.fill(drawn_LTK, side)
            self._drawn.send(side)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        self._results.fetch(side)
        event = self._ends[side]
        if event is not None:
            event.record()
        return side

    def collect(self, side: int, num_requests: int, rows: Sequence[int]) -> Decoded:
        """Wait for a step; the choices of ``rows`` count."""
        self._shared.wait(self._ends[side])
        self._shared.experts.finish(self._results.record(side)[:, :num_requests], rows)
        return Decoded(
            self._shared.hidden_BH[:num_requests],
            self._shared.logits_BV[:num_requests],
            self._results.ids(side)[:num_requests],
        )

    def _compute(self) -> None:
        """The step: everything from what was sent to the ids, on the current stream."""
        shared, rows = self._shared, slice(0, self._num_rows)
        hidden_BH = self._decoder.forward(self._batch, self._kv_caches)
        shared.hidden_BH[rows].copy_(hidden_BH)
        shared.logits_BV[rows].copy_(self._decoder.logits(hidden_BH))
        sample(
            shared.logits_BV[rows],
            self._draws,
            scratch=shared.scratch,
            out=self._results.ids_B,
        )
        self.staging.take_tokens(self._results.ids_B)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the step, with padding alone in it so that it changes nothing."""
        self.staging.fill([])
        self.staging.send()
        stream = self._shared.stream
        free_before = torch.cuda.mem_get_info()[0]
        stream.wait_stream(torch.cuda.current_stream())

        def warm_up() -> None:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._compute()

        self._shared.experts.run_stream(warm_up, stream.query)
        graph = torch.cuda.CUDAGraph()
        # other threads may use CUDA meanwhile, so only this one's mistakes count
        with torch.cuda.graph(
            graph, pool=self._shared.memory, stream=stream, capture_error_mode="thread_local"
        ):
            self._compute()
        taken = free_before - torch.cuda.mem_get_info()[0]
        _log.info("captured the step of %d requests: %.1f MiB", self._num_rows, taken / 2**20)
        return graph


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for the process: cuBLAS keeps 32 MiB for each stream that it has been used on."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def _event(device: torch.device) -> torch.cuda.Event | None:
    """None without a GPU, where nothing is ever under way."""
    return torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

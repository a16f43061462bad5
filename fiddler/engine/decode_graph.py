"""Decode steps with static shapes: one CUDA graph for each bucket of batch sizes.

Between two tokens Python fills one array, replays a graph and reads the ids; the CPU workers are
rung and awaited by the graph itself. A step takes the smallest bucket that its requests fit; the
rows beyond them are padding. The first step of a bucket captures its graph: twice it runs as it is,
so that everything is compiled and allocated, then it is recorded.

``is_eager`` runs the same operations without a graph, with the same bits as result.

Ordering: everything runs in torch's current stream but the capture, which has a stream of its own
and is awaited. All buckets share the memory of their intermediate results and the buffers of
:class:`offload.decode_experts.DecodeExperts`, so one step is under way at a time, and what it gives
back is good until the next.

Shapes: B rows of a bucket, R requests, H hidden, V vocabulary.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fiddler.engine.decode_staging import DrawnIds, Staging
from fiddler.engine.scheduler import Chunk
from fiddler.errors import WorkerError
from fiddler.models.buckets import bucket_for, largest_bucket
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
    """

    decoder: Decoder
    kernels: TritonKernels
    kv_caches: list[LayerKV]
    dtype: torch.dtype  # of the hidden states
    make_experts: Callable[[], DecodeExperts]
    renew_workers: Callable[[], None]
    settle: Callable[[], None]
    page_size: int
    max_num_seqs: int
    pages_per_request: int
    is_eager: bool


@dataclass(frozen=True, slots=True)
class Decoded:
    """Results of one step, good until the next; ``drawn_ids``: -1 where logits are not finite."""

    hidden_RH: torch.Tensor
    logits_RV: torch.Tensor
    drawn_ids: list[int]


class DecodeSteps:
    """Runs steps in which every request decodes one token."""

    def __init__(self, setup: DecodeSetup) -> None:
        self._setup = setup
        self._largest = largest_bucket(setup.max_num_seqs)
        self._shared: _Shared | None = None
        self._buckets: dict[tuple[int, bool], _Bucket] = {}

    def bucket(self, chunks: Sequence[Chunk], is_drawn: bool = False) -> int | None:
        """The bucket of a step, or None if it has to run another way.

        ``is_drawn``: its expert ids will be given to :meth:`run`.
        """
        num_rows = bucket_for(len(chunks), self._largest)
        if num_rows is None or not self._bucket(num_rows, is_drawn).staging.fits(chunks):
            return None
        return num_rows

    @torch.inference_mode()
    def run(
        self, chunks: Sequence[Chunk], num_rows: int, drawn_LTK: np.ndarray | None = None
    ) -> Decoded:
        """Run one step in the bucket of ``num_rows``; ``drawn_LTK``: see :class:`StepBatch`.

        WorkerError if the CPU workers failed; the next step has new ones.
        """
        try:
            bucket = self._bucket(num_rows, drawn_LTK is not None)
            bucket.run(chunks, drawn_LTK)
            return bucket.results(len(chunks))
        except WorkerError:
            self.clear()
            self._setup.renew_workers()
            raise

    def settle(self) -> None:
        """Before a step that runs another way: every expert is in its one place."""
        self._setup.settle()

    def clear(self) -> None:
        """Drop graphs and buffers; the next step makes new ones."""
        self._buckets.clear()
        self._shared = None

    def _bucket(self, num_rows: int, is_drawn: bool) -> "_Bucket":
        key = num_rows, is_drawn
        if key not in self._buckets:
            self._shared = self._shared or _Shared(self._setup, self._largest)
            self._buckets[key] = _Bucket(self._setup, self._shared, *key)
        return self._buckets[key]


class _Shared:
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


class _Bucket:
    """One number of rows: its static buffers and, after the first step, its graph."""

    def __init__(self, setup: DecodeSetup, shared: _Shared, num_rows: int, is_drawn: bool) -> None:
        max_pages = min(num_rows * setup.pages_per_request, MOST_PAGES)
        self.staging = Staging(num_rows, max_pages, setup.page_size, shared.device)
        self._shared, self._num_rows, self._is_eager = shared, num_rows, setup.is_eager
        self._drawn = DrawnIds(setup.decoder.config, num_rows, shared.device) if is_drawn else None
        self._batch, self._draws = self.staging.batch(), self.staging.draws()
        if self._drawn is not None:
            self._batch = replace(self._batch, drawn_LTK=self._drawn.device_LBK)
        experts = shared.experts.step(num_rows, self.staging.num_used)
        self._decoder = setup.decoder.plugged(setup.kernels.copy(), experts)
        self._kv_caches = setup.kv_caches
        is_gpu = shared.device.type == "cuda"
        self._ids_B = torch.zeros(num_rows, dtype=torch.int64, device=shared.device)
        self._host_ids_B = torch.zeros(num_rows, dtype=torch.int64, pin_memory=is_gpu)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, chunks: Sequence[Chunk], drawn_LTK: np.ndarray | None) -> None:
        """Return when the step's results are there."""
        experts = self._shared.experts
        experts.move_experts()
        experts.bind(self._num_rows)
        if not self._is_eager and self._graph is None:
            self._graph = self._capture()
        self.staging.fill(chunks)
        if self._drawn is not None and drawn_LTK is not None:
            self._drawn.fill(drawn_LTK)
        if self._graph is None:
            self._compute()
            _synchronize(self._shared.device)
        else:
            experts.run_stream(self._graph.replay, torch.cuda.current_stream().query)
        experts.finish(len(chunks))

    def results(self, num_requests: int) -> Decoded:
        """Of the step that has ended."""
        return Decoded(
            self._shared.hidden_BH[:num_requests],
            self._shared.logits_BV[:num_requests],
            self._host_ids_B[:num_requests].tolist(),
        )

    def _compute(self) -> None:
        """The step: everything from the staging array to the ids, on the current stream."""
        shared, rows = self._shared, slice(0, self._num_rows)
        self.staging.send()
        if self._drawn is not None:
            self._drawn.send()
        hidden_BH = self._decoder.forward(self._batch, self._kv_caches)
        shared.hidden_BH[rows].copy_(hidden_BH)
        shared.logits_BV[rows].copy_(self._decoder.logits(hidden_BH))
        sample(
            shared.logits_BV[rows],
            self._draws,
            scratch=shared.scratch,
            out=self._ids_B,
        )
        self._host_ids_B.copy_(self._ids_B, non_blocking=True)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Record the step, with padding alone in it so that it changes nothing."""
        self.staging.fill([])
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


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()

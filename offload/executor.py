"""Runs a layer's routed experts on both sides at once; many tokens by :mod:`offload.prefill`.

Ordering: ``launch`` copies the layer's input to host buffers on the current stream and waits for
that copy; then the worker pool reads the buffers while the device computes its own experts.
``result`` waits for the pool and enqueues the copy of its output back. The next ``launch`` waits on
the same stream before it overwrites a buffer, so at most one layer is ever under way. Experts that
come from disk are read while the device is given its own.

Shapes: T tokens, K top-k, H hidden, E experts.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cpu_kernels.expert_pool import ExpertPool, needs_compile
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import WeightKind
from offload.cold_weights import cold_packed, cold_weights
from offload.disk_job import DiskJob
from offload.expert_store import ExpertStore
from offload.host_buffers import HostBuffers, HostRows
from offload.pool_keeper import PoolKeeper
from offload.prefill_record import StepRecord
from offload.prefill_split import LEAST_TOKENS
from offload.residents import residents_of
from offload.step_routing import RoutingRecord, StepRouting
from offload.worker_errors import workers_errors
from offload.worker_pool import WorkerPool

if TYPE_CHECKING:
    from offload.prefill import PendingPrefill, PrefillExperts  # triton, for GPUs only


def needs_warm_up(kind: WeightKind, activations: Activations = "f32") -> bool:
    """Whether :func:`warm_up` will have to compile, as far as can be told."""
    return needs_compile(kind, activations)


def warm_up(pool: WorkerPool, kind: WeightKind, activations: Activations = "f32") -> None:
    """Compile the kernels for experts of ``kind``, by adding a layer of one small expert."""
    pool.remove_layer(pool.add_layer(_small(kind), activations=activations))


def _small(kind: WeightKind) -> Experts:
    if kind.is_packed:
        return cold_packed(1, PackedShape(kind, 1, 1)).experts
    return cold_weights(1, 1, 1, torch.float32 if kind.codes == "f32" else torch.bfloat16).experts


class HybridExperts:
    """Splits each layer's (token, expert) pairs between the device and the CPU pool."""

    def __init__(
        self,
        store: ExpertStore,
        pool: WorkerPool,
        *,
        device: torch.device,
        max_tokens: int,
        top_k: int,
        prefill: "PrefillExperts | None" = None,
        activations: Activations = "f32",
    ) -> None:
        """``prefill`` takes the steps of many tokens; None: they go the way of the others.

        ``activations``: what the pool rounds those of the others to.
        """
        self._store, self._activations = store, activations
        self._prefill = prefill
        self._device, self._residents = device, residents_of(store, device)
        self._top_k = top_k
        is_gpu = device.type == "cuda"
        if prefill is not None:  # which has buffers of its own for larger steps
            max_tokens = min(max_tokens, LEAST_TOKENS - 1)
        self._max_tokens = max_tokens
        self._copied = torch.cuda.Event() if is_gpu else None  # type: ignore[no-untyped-call]
        self._use_pool(pool)
        self._record = RoutingRecord(store)
        self.begin_step(0)

    @property
    def store(self) -> ExpertStore:
        """Where the experts lie."""
        return self._store

    @property
    def device(self) -> torch.device:
        """What computes the resident experts."""
        return self._device

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self._top_k

    @property
    def pool(self) -> WorkerPool:
        """The pool in use."""
        return self._pool

    @property
    def pool_layers(self) -> dict[int, Any]:
        """The pool's layers, by number; those that have cold experts."""
        return self._pool_layers

    @property
    def routing(self) -> StepRouting:
        """What the last step chose; waits for it where the host has not had to."""
        return self._record.step

    @routing.setter
    def routing(self, chosen: StepRouting) -> None:
        self._record.replace(chosen)

    @property
    def counts_LE(self) -> np.ndarray:
        """How often each expert was chosen, in all steps."""
        return self._record.counts_LE

    @property
    def jobs(self) -> dict[int, int]:
        """The layer of each of the pool's jobs, by the job's number."""
        jobs: dict[int, int] = {}
        for layers in (self._pool_layers, self._prefill.pool_layers if self._prefill else {}):
            for layer, added in layers.items():
                jobs[added.number] = layer
        return jobs

    @property
    def prefill_record(self) -> StepRecord | None:
        """How the last step of many tokens was divided; None where no such step is."""
        return self._prefill.record if self._prefill is not None else None

    def renew_workers(self, keeper: PoolKeeper) -> None:
        """Go on with a new pool of the keeper's, whose last one failed."""
        self.replace_pool(keeper.replace())

    def replace_pool(self, pool: ExpertPool) -> None:
        """Go on with ``pool``; the one used before keeps what it has."""
        self._use_pool(pool)
        if self._prefill is not None:
            self._prefill.use_pool(pool)

    def _use_pool(self, pool: WorkerPool) -> None:
        self._pool = pool
        # Others than the last pool's, whose workers may be late and write to theirs.
        self._host = HostBuffers(
            self._max_tokens,
            self._store.shape.hidden_size,
            self._top_k,
            pin=self._device.type == "cuda",
        )
        self._pool_layers: dict[int, Any] = {}  # of the layers that have cold experts
        for layer in self._store.shape.moe_layers:
            experts = self._store[layer]
            if experts.cpu_experts is not None:
                added = pool.add_layer(
                    experts.cpu_experts, activations=self._activations, place_of=experts.row_E
                )
                self._pool_layers[layer] = added

    def begin_step(self, num_tokens: int) -> None:
        """Start a new record of routing, once no worker is busy with an abandoned step.

        WorkerError if one has failed.
        """
        with workers_errors():
            self._pool.wait()
        if self._prefill is not None and num_tokens >= LEAST_TOKENS:
            self._prefill.begin_step(num_tokens)
        self._record.begin(num_tokens)

    def routed_ids(self, rows: slice) -> np.ndarray:
        """The step's choices for some tokens, int16 ``[tokens, layers, K]``; -1: no experts."""
        return self._record.routed_ids(rows, self._top_k)

    def launch(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> "PendingLayer | PendingPrefill":
        """Start one layer on both sides."""
        if not self._asks_the_host(layer, len(x_TH)):
            return PendingLayer(self, self._on_device(layer, x_TH, ids_TK, weights_TK), None)
        if self._prefill is not None and len(x_TH) >= LEAST_TOKENS:
            record = functools.partial(self._record.add, layer)
            return self._prefill.launch(layer, x_TH, ids_TK, weights_TK, record)
        rows = self._to_host(x_TH, ids_TK, weights_TK)
        _, ids, _, _ = rows.arrays
        experts = self._store[layer]
        cold_TK = experts.slot_E[ids] < 0
        self._record.add(layer, ids)
        has_cold = bool(cold_TK.any())
        from_disk = None
        if has_cold and self._store.cache is not None:
            from_disk = DiskJob(self._store.cache, layer, rows.arrays, cold_TK)
        elif has_cold:
            with workers_errors():
                self._pool.submit(self._pool_layers[layer], *rows.arrays)
        is_all_cold = has_cold and bool(cold_TK.all())
        hot_TH = None if is_all_cold else self._residents.products(layer, x_TH, ids_TK, weights_TK)
        if from_disk is not None:
            from_disk.submit(self._pool, self._pool_layers[layer])
        return PendingLayer(self, hot_TH, rows.out_TH if has_cold else None)

    def collect(self, out_TH: torch.Tensor) -> torch.Tensor:
        """Wait for the pool and return its part on the device, a copy."""
        with workers_errors():
            self._pool.wait()
        return out_TH.to(self._device, non_blocking=True, copy=True)

    def clear(self) -> None:
        """Let the pool forget the layers and their weights; nothing can be launched after."""
        for pool_layer in self._pool_layers.values():
            self._pool.remove_layer(pool_layer)
        self._pool_layers.clear()
        self._residents.clear()
        if self._prefill is not None:
            self._prefill.clear()

    def _asks_the_host(self, layer: int, num_tokens: int) -> bool:
        """Whether it has to know what the layer chooses before the step goes on."""
        if self._prefill is not None and num_tokens >= LEAST_TOKENS:
            return not self._prefill.has_only_residents(layer)
        return layer in self._pool_layers

    def _on_device(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """All of a layer's experts where none is cold."""
        ids_TK = ids_TK.int().contiguous()
        self._record.add_later(layer, ids_TK)
        step = x_TH, ids_TK, weights_TK
        if self._prefill is not None and len(x_TH) >= LEAST_TOKENS:
            return self._prefill.residents(layer, *step)
        return self._residents.products(layer, *step)

    def _to_host(
        self, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> HostRows:
        rows = self._host.rows(len(x_TH))
        # converted where they lie: between types a copy from the device takes a detour
        rows.x_TH.copy_(x_TH.float(), non_blocking=True)
        rows.ids_TK.copy_(ids_TK.int(), non_blocking=True)
        rows.weights_TK.copy_(weights_TK, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
            self._copied.synchronize()
        return rows


@dataclass(frozen=True, slots=True)
class PendingLayer:
    """One layer under way; ``result`` must be called once, before the next launch."""

    _experts: HybridExperts
    _hot_TH: torch.Tensor | None
    _host_out_TH: torch.Tensor | None  # where the pool writes; None: nothing is cold

    late = None

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The result as the one part that there is."""
        return (self.result(),)

    def result(self) -> torch.Tensor:
        """Return the float32 sum ``[T, H]`` of both sides."""
        if self._host_out_TH is None:
            assert self._hot_TH is not None
            return self._hot_TH
        cold_TH = self._experts.collect(self._host_out_TH)
        return cold_TH if self._hot_TH is None else cold_TH + self._hot_TH

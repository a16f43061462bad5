"""Routed experts of a few tokens, divided by the device: nothing here asks what the router chose.

Where an expert lives is data: ``slot_LE`` on the device says what the device computes, and the
workers are given the ids of the rest. Of their rows the device pulls the last ones: it reads
them from host memory itself, while the workers read the others (:mod:`offload.cold_share`). So the
same operations serve every step, and a CUDA graph may hold them; what was chosen is found in a
record that the device keeps. How many rows are pulled depends on how many cold experts the step
has: with other requests beside it a token's sums may be rounded elsewhere.

Ordering: per layer the stream publishes what the workers need and rings them, computes its own
experts, with those that it pulls beside them on a second stream, and waits for both. All layers
share the buffers in mapped memory: only one is under way at a time, since what reads the workers'
part precedes the next layer's publishing on the stream. The host binds the buffers and sends new
tables only while no step is under way; tables go on the stream, before the step that is to see
them. A step may be put behind one that is under way, as long as neither changes.

Shapes: L layers, T rows of the step, K top-k, H hidden, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.watchdog import PATIENCE_S
from gpu_kernels.expert_decode import (
    MAX_TOKENS,
    MAX_TOP_K,
    DecodeWorkspace,
    expert_decode,
)
from gpu_kernels.expert_weights import ExpertLayer
from gpu_kernels.hand_over import ColdWork, publish
from gpu_kernels.host_words import Bell
from offload.adaptive_placement import AdaptivePlacement
from offload.cold_share import ShareCosts
from offload.executor import HybridExperts
from offload.expert_store import ExpertStore
from offload.handoff import HandOff, await_stream
from offload.host_buffers import HostBuffers, HostRows
from offload.place_table import PlaceTable
from offload.pulled_experts import PulledExperts
from offload.side_stream import SideStream
from offload.slot_weights import resident_layer
from offload.step_routing import StepRouting
from offload.worker_errors import workers_errors
from offload.worker_pool import FedWorkers

MAX_ROWS = MAX_TOKENS


def why_not(store: ExpertStore, dtype: torch.dtype, top_k: int) -> str:
    """Why the device cannot divide these experts with activations of ``dtype``, or nothing."""
    if store.cache is not None:
        return "experts on disk are read when the host knows what a step needs"
    if top_k > MAX_TOP_K:
        return f"{top_k} experts per token are more than {MAX_TOP_K}"
    kinds = {
        store[layer].gpu_w2_SHI.dtype
        for layer in store.shape.moe_layers
        if len(store[layer].gpu_w2_SHI)
    }
    if not store.is_packed and kinds - {dtype}:
        return f"experts on the GPU are stored in another type than {dtype}"
    return ""


class DecodeExperts:
    """Everything that steps of up to ``max_rows`` rows share, for one pool of workers."""

    def __init__(
        self,
        experts: HybridExperts,
        workers: FedWorkers,
        hand_off: HandOff,
        *,
        dtype: torch.dtype,
        max_rows: int,
        share: ShareCosts | None = None,
        adaptive: AdaptivePlacement | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """``workers`` are those of the pool that ``experts`` use.

        ``share`` says what the device pulls of cold experts; None: the workers compute them all.
        ``adaptive`` moves experts between steps; None: they stay.
        """
        assert max_rows <= MAX_ROWS
        store, top_k, device = experts.store, experts.top_k, experts.device
        assert not why_not(store, dtype, top_k)
        self.pool = experts.pool
        self.hand_off = hand_off
        self.pool_layers = experts.pool_layers
        self._numbers = [layer.number for layer in self.pool_layers.values()]
        self._workers = workers
        self._patience_s = patience_s
        shape, is_gpu = store.shape, device.type == "cuda"
        self._experts = experts
        self._slots = PlaceTable(store, "slot_E", device)
        self.slot_LE = self._slots.device_LE
        self._adaptive = adaptive
        self._version = 0 if adaptive is None else adaptive.version
        self.layers = {
            layer: resident_layer(store[layer])
            for layer in shape.moe_layers
            if len(store[layer].gpu_w2_SHI)
        }
        self.pulled = None
        if share is not None:
            self.pulled = PulledExperts(
                store,
                share,
                device=self.slot_LE.device,
                dtype=dtype,
                max_rows=max_rows,
                top_k=top_k,
            )
        self.workspace = _workspace(self.layers.values(), max_rows * top_k, dtype)
        pulled_layers = {} if self.pulled is None else self.pulled.layers
        self.pull_workspace = _workspace(pulled_layers.values(), max_rows * top_k, dtype)
        self.side = SideStream(self.slot_LE.device)
        self._host = HostBuffers(max_rows, shape.hidden_size, top_k, pin=is_gpu)

    def pulled_bytes(self, step: StepRouting) -> float:
        """What the device has read of host memory in ``step``; the workers, of the rest."""
        if self.pulled is None:
            return 0.0
        return sum(
            self.pulled.num_bytes(layer, len(np.unique(ids[~step.is_resident_LE[layer][ids]])))
            for layer, ids in step.ids.items()
        )

    def record_shape(self, num_rows: int) -> tuple[int, int, int]:
        """Of the record of what so many rows choose, ``[L, T, K]``."""
        return self._experts.store.shape.num_layers, num_rows, self._experts.top_k

    def step(
        self, num_rows: int, num_used: torch.Tensor, record_LTK: torch.Tensor
    ) -> "StepExperts":
        """What a decoder runs for ``num_rows`` rows, of which ``num_used`` (int32 [1]) count.

        What they choose is written to ``record_LTK``, int32 on the device.
        """
        return StepExperts(self, self._host.rows(num_rows), num_used, record_LTK)

    @property
    def must_move(self) -> bool:
        """Whether experts are to change places before another step."""
        return self._adaptive is not None and self._adaptive.must_move

    def move_experts(self) -> None:
        """Let experts change places; before a step, on the stream that it will run on."""
        if self._adaptive is None:
            return
        self._adaptive.move()
        if self._adaptive.version != self._version:
            self._version = self._adaptive.version
            self._slots.send()
            if self.pulled is not None:
                self.pulled.rows.send()

    def bind(self, num_rows: int) -> None:
        """Make the workers' next jobs be about so many rows; before a step, at once if they are."""
        arrays = self._host.rows(num_rows).arrays
        for layer, pool_layer in self.pool_layers.items():
            kept_N = None if self.pulled is None else self.pulled.kept_rows(layer)
            self.pool.bind(pool_layer, *arrays, kept_N)

    def run_stream(self, work: Callable[[], None], is_idle: Callable[[], bool]) -> None:
        """Call ``work``, which puts steps on a stream, and return when ``is_idle`` says it is.

        WorkerError if the pool failed meanwhile: it, and all that is bound to it, has to be
        replaced.
        """
        with self._workers.awake():
            try:
                work()
            finally:
                self._await(is_idle, is_idle)

    def await_step(self, is_done: Callable[[], bool], is_idle: Callable[[], bool]) -> None:
        """Return when a step that is on a stream is done, with others behind it or not.

        WorkerError as from :meth:`run_stream`; then the stream is idle. Workers that have gone to
        sleep since the step was put there are woken.
        """
        with self._workers.awake():
            self._await(is_done, is_idle)

    def _await(self, is_done: Callable[[], bool], is_idle: Callable[[], bool]) -> None:
        words = self._workers.words
        await_stream(is_done, is_idle, words, self._numbers, self._patience_s)

    def finish(self, record_LTK: npt.NDArray[np.int32], rows: Sequence[int]) -> None:
        """Take over what a step that has ended chose; the choices of ``rows`` count.

        WorkerError if the pool failed.
        """
        with workers_errors():
            self.pool.wait()
        moe_layers = list(self._experts.store.shape.moe_layers)
        ids_LTK = record_LTK[moe_layers]
        slot_LTK = np.take_along_axis(
            self._slots.host_LE[moe_layers], ids_LTK.reshape(len(moe_layers), -1), axis=1
        ).reshape(ids_LTK.shape)
        num_hot_T = (slot_LTK >= 0).sum(axis=(0, 2))
        num_cold_T = len(moe_layers) * ids_LTK.shape[2] - num_hot_T
        if self._adaptive is not None:
            self._adaptive.count(moe_layers, ids_LTK[:, rows])
        chosen = dict(zip(moe_layers, ids_LTK.astype(np.int16), strict=True))
        self._experts.routing = StepRouting(num_hot_T, num_cold_T, chosen, self._slots.host_LE >= 0)
        counts_LE = self._experts.counts_LE
        layer_L11 = np.asarray(moe_layers)[:, None, None]
        flat = (layer_L11 * counts_LE.shape[1] + ids_LTK[:, rows]).ravel()
        counts_LE += np.bincount(flat, minlength=counts_LE.size).reshape(counts_LE.shape)


def _workspace(
    layers: Iterable[ExpertLayer], num_pairs: int, dtype: torch.dtype
) -> DecodeWorkspace | None:
    """Of the layer that needs most: how many sums a row has depends on the kind of weights."""
    made = (DecodeWorkspace.make(layer, num_pairs, dtype) for layer in layers)
    return max(made, key=lambda workspace: workspace.part_PSH.numel(), default=None)


@dataclass(frozen=True, slots=True)
class StepExperts:
    """The decoder's backend for one number of rows."""

    _shared: DecodeExperts
    _rows: HostRows
    _num_used: torch.Tensor
    _record_LTK: torch.Tensor

    def launch(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> "PendingStep":
        """Put one layer on the stream, up to where its result is needed."""
        shared, rows = self._shared, self._rows
        slot_E, pool_layer = shared.slot_LE[layer], shared.pool_layers.get(layer)
        cold = None
        if pool_layer is not None:
            ring = shared.hand_off.rung(pool_layer.number)
            cold = ColdWork(rows.x_TH, rows.ids_TK, rows.weights_TK, ring)
        pulled = shared.pulled
        pulling = None if pulled is None else pulled.pulls(layer, len(ids_TK))
        pulls, last_rows = pulling or (None, None)
        used_TK = publish(
            *(x_TH, ids_TK, weights_TK, slot_E, self._num_used, self._record_LTK[layer], cold),
            pulls=pulls,
        )
        number = 0
        if pool_layer is not None:
            number = pool_layer.number
            shared.hand_off.ring(number)
        own: list[torch.Tensor] = []
        side = None
        if pulled is not None and pulls is not None:
            side = shared.side
            with side.beside():  # it waits for the link, not for the device
                own.append(
                    expert_decode(
                        *(x_TH, pulls.ids_TK, weights_TK, pulls.place_E, pulled.layers[layer]),
                        last_rows=last_rows,
                        workspace=shared.pull_workspace,
                    )
                )
        if layer in shared.layers:
            resident_TH = expert_decode(
                *(x_TH, used_TK, weights_TK, slot_E, shared.layers[layer]),
                workspace=shared.workspace,
            )
            own.insert(0, resident_TH)
        return PendingStep(
            shared.hand_off, number, tuple(own), rows.out_TH, side, (x_TH, weights_TK)
        )


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A layer on the stream; ``parts`` is called once, before the next launch."""

    _hand_off: HandOff
    _number: int  # of the workers' job; 0: none
    _own: tuple[torch.Tensor, ...]
    _host_out_TH: torch.Tensor
    _side: SideStream | None  # where some of its own are computed
    _read: tuple[torch.Tensor, ...]  # what that reads: it must not be anybody else's before

    @property
    def late(self) -> Bell | None:
        """See :class:`fiddler.models.decoder.PendingExperts`."""
        return self._hand_off.awaited(self._number) if self._number else None

    def parts(self) -> tuple[torch.Tensor, ...]:
        """The residents' part, the pulled experts', then the workers', in mapped memory.

        Which of them is still to be awaited ``late`` says.
        """
        if self._side is not None:
            self._side.join()
        if self._number == 0:
            return self._own
        self._hand_off.wait(self._number)
        return (*self._own, self._host_out_TH)

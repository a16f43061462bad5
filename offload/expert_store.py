"""Where the weights of all routed experts lie: each expert in exactly one place.

While a model runs, experts may change places (:mod:`offload.swaps`), and the tables with them; the
arrays that hold weights and tables stay the same ones.

The GPU side has slots in device memory; the CPU side has rows in host memory. On a machine without
a GPU both are host memory: torch computes the slots there, the worker pool the rows. Layout of one
expert, everywhere: ``w13 [2I, H]`` (gate rows, then up rows) and ``w2 [H, I]``, contiguous; or, of
packed experts, their bytes (docs/packed-experts.md), w13's and then w2's. Experts of one layer are
of one kind and size; layers may differ. Where host memory cannot
hold all rows, only some have pages (:mod:`offload.row_cache`).

Ordering: reader threads fill, and thereby create the pages of, one layer after the other; a layer's
host memory is pinned by other threads as soon as it is full, while the next ones are read. It is
unpinned before it is let go.

Shapes: S slots, C rows on the CPU side, F = 2I, H hidden, I expert width, B bytes of a packed
expert.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import WeightKind
from offload.cold_weights import ColdWeights, cold_packed, cold_weights
from offload.cuda_driver import DriverError
from offload.layer_experts import LayerExperts
from offload.pinning import PinnedMemory
from offload.placement import Placement
from offload.reader_threads import reader_threads
from offload.row_cache import Key, RowCache, give_back_pages
from offload.slot_room import SlotRoom

# fill(layer, expert, w13_FH, w2_HI), or of packed experts fill(layer, expert, blob_B): write one
# expert's weights into the given tensors
FillExpert = Callable[..., None]
PIN_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """Sizes that all routed experts share; ``moe_layers`` are the layers that have experts."""

    num_layers: int
    moe_layers: Sequence[int]
    num_experts: int
    hidden_size: int
    expert_size: int


class ExpertStore:
    """Owns the experts' memory; filled once, read by :class:`offload.executor.HybridExperts`."""

    def __init__(
        self,
        shape: ExpertShape,
        placement: Placement,
        *,
        device: torch.device,
        dtype: torch.dtype,
        packed: WeightKind | Mapping[int, WeightKind] | None = None,
        has_spares: bool = False,
        cached: Placement | None = None,
    ) -> None:
        """``dtype`` of packed experts is uint8; ``packed`` is their kind, or each layer's own.

        ``has_spares``: a slot more in each layer with experts on both sides, to swap them.
        ``cached``: host memory holds as many cold experts at a time, and begins with these; None:
        it holds them all.
        """
        self.is_packed = packed is not None
        assert self.is_packed == (dtype == torch.uint8)
        assert len(placement.resident) == shape.num_layers
        self.shape = shape
        self.placement = placement
        self.dtype = dtype
        self._has_spares = has_spares
        kinds = packed if isinstance(packed, Mapping) else dict.fromkeys(shape.moe_layers, packed)
        self._cold: dict[int, ColdWeights] = {}
        room = SlotRoom(
            [n for m in shape.moe_layers for n in self._slot_bytes(m, kinds[m])], device
        )
        self._layers = {
            layer: self._allocate(placement.resident[layer], layer, room, kinds[layer])
            for layer in shape.moe_layers
        }
        self.cache = None if cached is None else RowCache(_keys(cached), self._let_go)
        # pages that are given back must not be pinned
        is_gpu = device.type == "cuda" and bool(self._cold) and self.cache is None
        self._pinned = PinnedMemory(self) if is_gpu else None

    def __getitem__(self, layer: int) -> LayerExperts:
        return self._layers[layer]

    def fill(
        self,
        fill_expert: FillExpert,
        *,
        num_threads: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write every expert to its place, ``num_threads`` at a time; pin what a GPU is to read.

        ``on_progress(done, total)`` counts experts. The first error ends the filling. Where the
        driver pins no more, a RuntimeWarning says so: copies from the rest are then slower. Where
        experts stay on disk, ``fill_expert`` is called again whenever one is needed.
        """
        work = [
            (layer, e)
            for layer in self._layers
            for e in range(self.shape.num_experts)
            if self._begins_in_memory(layer, e)
        ]

        def fill_one(item: tuple[int, int]) -> tuple[int, int]:
            fill_expert(*item, *self._layers[item[0]].place(item[1]))
            return item

        pins: list[Future[None]] = []
        readers = reader_threads(num_threads)
        if self.cache is not None:
            self.cache.read_with(lambda *item: fill_one(item), readers)
        with (
            ThreadPoolExecutor(PIN_THREADS, thread_name_prefix="fiddler-pin") as pinners,
            readers if self.cache is None else nullcontext(),
        ):
            for done, (layer, expert) in enumerate(readers.map(fill_one, work), start=1):
                if expert == self.shape.num_experts - 1:  # in order: the layer is full
                    pins.append(pinners.submit(self._pin, layer))
                if on_progress is not None:
                    on_progress(done, len(work))
        refused = [error for pin in pins if (error := pin.exception()) is not None]
        for error in refused[:1]:
            if not isinstance(error, DriverError):
                raise error
            text = _pageable_text(error, len(refused), len(self._cold))
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _begins_in_memory(self, layer: int, expert: int) -> bool:
        is_resident = self._layers[layer].slot_E[expert] >= 0
        return is_resident or self.cache is None or (layer, expert) in self.cache

    def _let_go(self, layer: int, expert: int) -> None:
        for row in self._layers[layer].place(expert):
            give_back_pages(row)

    def _pin(self, layer: int) -> None:
        if self._pinned is not None and layer in self._cold:
            self._pinned.pin(self._cold[layer].address, self._cold[layer].num_bytes)

    def weights(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of one expert's ``(w13_FH, w2_HI)`` where they lie; copies if packed."""
        return self._layers[layer].weights(expert)

    def expert_bytes(self, layer: int) -> int:
        """Of one of the layer's experts, in memory."""
        packed = self._layers[layer].packed
        if packed is not None:
            return packed.expert_bytes
        return 3 * self.shape.hidden_size * self.shape.expert_size * self.dtype.itemsize

    @property
    def largest_layer(self) -> int:
        """The first layer whose experts are the largest."""
        return max(self.shape.moe_layers, key=self.expert_bytes)

    @property
    def mean_expert_bytes(self) -> float:
        """Of an expert, where layers differ."""
        layers = self.shape.moe_layers
        return sum(map(self.expert_bytes, layers)) / len(layers)

    def is_resident_LE(self) -> np.ndarray:
        """Which experts have a slot now, bool ``[L, E]``."""
        is_resident_LE = np.zeros((self.shape.num_layers, self.shape.num_experts), dtype=bool)
        for layer, at in self._layers.items():
            is_resident_LE[layer] = at.slot_E >= 0
        return is_resident_LE

    def clear(self) -> None:
        """Drop all weights."""
        if self.cache is not None:
            self.cache.close()
        if self._pinned is not None:
            self._pinned.release()
        self._layers.clear()
        self._cold.clear()

    def _num_slots(self, layer: int) -> int:
        num_hot = len(self.placement.resident[layer])
        return num_hot + (self._has_spares and 0 < num_hot < self.shape.num_experts)

    def _slot_bytes(self, layer: int, kind: WeightKind | None) -> list[int]:
        """Of each tensor that holds the layer's slots."""
        num_slots, h, i = self._num_slots(layer), self.shape.hidden_size, self.shape.expert_size
        if kind is not None:
            return [num_slots * PackedShape(kind, h, i).expert_bytes]
        return [num_slots * rows * h * i * self.dtype.itemsize for rows in (2, 1)]

    def _allocate(
        self, resident: frozenset[int], layer: int, room: SlotRoom, kind: WeightKind | None
    ) -> LayerExperts:
        shape, dtype = self.shape, self.dtype
        slot_E = np.full(shape.num_experts, -1, dtype=np.int32)
        row_E = np.full(shape.num_experts, -1, dtype=np.int32)
        hot = sorted(resident)
        cold = [e for e in range(shape.num_experts) if e not in resident]
        slot_E[hot] = np.arange(len(hot), dtype=np.int32)
        row_E[cold] = np.arange(len(cold), dtype=np.int32)
        expert_C = np.array(cold, dtype=np.int32)
        num_slots = self._num_slots(layer)
        if kind is not None:
            packed = PackedShape(kind, shape.hidden_size, shape.expert_size)
            tables = slot_E, row_E, expert_C
            return self._allocate_packed(tables, num_slots, layer, room, packed)
        f, h, i = 2 * shape.expert_size, shape.hidden_size, shape.expert_size
        rows = cold_weights(len(cold), h, i, dtype) if cold else None
        if rows is not None:
            self._cold[layer] = rows
        return LayerExperts(
            slot_E,
            row_E,
            expert_C,
            rows.experts if rows else None,
            room.take(dtype, num_slots, f, h),
            room.take(dtype, num_slots, h, i),
            rows.w13_CFH if rows else torch.empty(0, f, h, dtype=dtype),
            rows.w2_CHI if rows else torch.empty(0, h, i, dtype=dtype),
        )

    def _allocate_packed(
        self,
        tables: tuple[np.ndarray, np.ndarray, np.ndarray],
        num_slots: int,
        layer: int,
        room: SlotRoom,
        packed: PackedShape,
    ) -> LayerExperts:
        expert_C = tables[2]
        slots_SB = room.take(torch.uint8, num_slots, packed.expert_bytes)
        rows = cold_packed(len(expert_C), packed) if len(expert_C) else None
        if rows is not None:
            self._cold[layer] = rows
        blob_CB = rows.blob_CB if rows else None
        no_rows = torch.empty(0, packed.expert_bytes, dtype=torch.uint8)
        rows_CB = no_rows if blob_CB is None else blob_CB
        return LayerExperts(
            *tables,
            rows.experts if rows else None,
            slots_SB[:, : packed.w2_offset],
            slots_SB[:, packed.w2_offset :],
            rows_CB[:, : packed.w2_offset],
            rows_CB[:, packed.w2_offset :],
            packed,
            slots_SB,
            rows_CB,
        )


def _keys(placement: Placement) -> list[Key]:
    return [(layer, e) for layer, some in enumerate(placement.resident) for e in sorted(some)]


def _pageable_text(error: DriverError, num_refused: int, num_layers: int) -> str:
    return (
        f"the host memory of {num_refused} of {num_layers} layers could not be pinned ({error}): "
        "prompts are computed more slowly, and the GPU takes no part in their cold experts; "
        "free some memory, or raise the limit on locked memory"
    )

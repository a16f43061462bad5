"""Rows of cold experts that the device reads from host memory by itself in decode steps, over PCIe.

Pinned memory is mapped: kernels take the rows on the host like slots on the device. A step's cold
experts of a layer lie end to end; the first rows stay with the workers and the others are pulled.
How many is a table by the number of cold experts (:mod:`offload.cold_share`), one for each kind of
experts, which the device and every worker look up for themselves.

Shapes: L layers, B rows of a step at most, K top-k, N counts of experts.
"""

from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels.packed_layout import PackedShape
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer, PackedWeights
from gpu_kernels.hand_over import Pulls
from gpu_kernels.last_rows import LastRows
from offload.cold_share import ShareCosts, kept_rows
from offload.expert_store import ExpertStore
from offload.layer_experts import LayerExperts
from offload.place_table import PlaceTable
from offload.slot_weights import slot_weights


class PulledExperts:
    """What the device needs for it. ``layers`` are those whose rows it can read.

    A layer that could not be pinned is not among them; filling the store has said so.
    """

    def __init__(
        self,
        store: ExpertStore,
        costs: ShareCosts,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_rows: int,
        top_k: int,
    ) -> None:
        """``device`` with its index, if it is a GPU; ``dtype`` is that of the hidden states."""
        shape = store.shape
        self._width = shape.expert_size
        shares: dict[PackedShape | None, _Share] = {}
        for layer in shape.moe_layers:
            packed = store[layer].packed
            if packed not in shares:
                group = 1 if packed is None else packed.kind.group
                sizes = shape.num_experts, shape.expert_size, store.expert_bytes(layer)
                kept_N = kept_rows(*sizes, costs, group)
                unit = max(costs.unit, group)
                on_device = torch.from_numpy(kept_N).to(device)
                shares[packed] = _Share(kept_N, on_device, unit, sizes, group)
        self._ids_BK = torch.empty((max_rows, top_k), dtype=torch.int32, device=device)
        self._first_BK = torch.empty((max_rows, top_k), dtype=torch.int32, device=device)
        self.rows = PlaceTable(store, "row_E", device)
        kernels_take_it = store.is_packed or dtype in (store.dtype, torch.float32)
        self.layers = {
            layer: ExpertLayer(_rows(store[layer]), reader=device)
            for layer in shape.moe_layers
            if kernels_take_it and _can_read(device, store[layer])
        }
        self._kinds = tuple(shares.values())
        self._shares = {layer: shares[store[layer].packed] for layer in self.layers}
        # the workers' views of the table, always the same ones: a layer has as many rows as it had
        self._kept_of = {
            layer: share.host_kept_N[: len(store[layer].cpu_w2_CHI) + 1]
            for layer, share in self._shares.items()
        }

    def share(self, costs: ShareCosts) -> None:
        """Divide cold experts anew while no step is under way.

        Steps that were captured before have room for no more of an expert than was pulled then.
        """
        for share in self._kinds:
            share.host_kept_N[:] = kept_rows(*share.sizes, costs, share.group)
            share.kept_N.copy_(torch.from_numpy(share.host_kept_N))

    def kept_rows(self, layer: int) -> np.ndarray | None:
        """Rows of n experts end to end that the workers compute, by n; None: all."""
        return self._kept_of.get(layer)

    def num_bytes(self, layer: int, num_cold: int) -> float:
        """Of so many distinct cold experts of a step, what the device reads."""
        if layer not in self._shares:
            return 0.0
        share = self._shares[layer]
        _, width, expert_bytes = share.sizes
        return (num_cold * width - int(share.host_kept_N[num_cold])) * expert_bytes / width

    def pulls(self, layer: int, num_rows: int) -> tuple[Pulls, LastRows] | None:
        """Where the device leaves what it pulls, and which rows of it; None: it never does."""
        if layer not in self.layers:
            return None
        ids_TK, first_TK = self._ids_BK[:num_rows], self._first_BK[:num_rows]
        kept_N = self._kept_of[layer][: ids_TK.numel() + 1]
        most = min(self._width, int((self._width * np.arange(len(kept_N)) - kept_N).max()))
        if most == 0:
            return None
        share, place_E = self._shares[layer], self.rows.device_LE[layer]
        pulls = Pulls(share.kept_N, place_E, self._width, ids_TK, first_TK)
        return pulls, LastRows(first_TK, most, share.unit)


@dataclass(frozen=True, slots=True)
class _Share:
    """Of layers with experts of one kind: the table, for either side, and what it counts in.

    ``sizes``: experts of a layer, width and bytes of one.
    """

    host_kept_N: np.ndarray
    kept_N: torch.Tensor
    unit: int
    sizes: tuple[int, int, int]
    group: int


def _rows(at: LayerExperts) -> DenseWeights | PackedWeights:
    return slot_weights(at.cpu_parts, at.packed)


def _can_read(device: torch.device, at: LayerExperts) -> bool:
    if not len(at.cpu_w2_CHI):
        return False
    return device.type != "cuda" or all(part.is_pinned() for part in at.cpu_parts)

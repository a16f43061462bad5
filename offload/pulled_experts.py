"""Rows of cold experts that the device reads from host memory by itself in decode steps, over PCIe.

Pinned memory is mapped: kernels take the rows on the host like slots on the device. A step's cold
experts of a layer lie end to end; the first rows stay with the workers and the others are pulled.
How many is a table by the number of cold experts (:mod:`offload.cold_share`), which the device and
every worker look up for themselves.

Shapes: L layers, B rows of a step at most, K top-k, N counts of experts.
"""

import numpy as np
import torch

from gpu_kernels.expert_weights import ExpertLayer
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
        group = store.packed.kind.group if store.packed is not None else 1
        self._unit = max(costs.unit, group)
        self._width = shape.expert_size
        self._host_kept_N = kept_rows(
            shape.num_experts, shape.expert_size, store.expert_bytes, costs, group
        )
        self._kept_N = torch.from_numpy(self._host_kept_N).to(device)
        self._ids_BK = torch.empty((max_rows, top_k), dtype=torch.int32, device=device)
        self._first_BK = torch.empty((max_rows, top_k), dtype=torch.int32, device=device)
        self.rows = PlaceTable(store, "row_E", device)
        kernels_take_it = store.packed is not None or dtype in (store.dtype, torch.float32)
        self.layers = {
            layer: ExpertLayer(slot_weights(store[layer].cpu_parts, store.packed), reader=device)
            for layer in shape.moe_layers
            if kernels_take_it and _can_read(device, store[layer])
        }
        # the workers' views of the table, always the same ones: a layer has as many rows as it had
        self._kept_of = {
            layer: self._host_kept_N[: len(store[layer].cpu_w2_CHI) + 1] for layer in self.layers
        }

    def kept_rows(self, layer: int) -> np.ndarray | None:
        """Rows of n experts end to end that the workers compute, by n; None: all."""
        return self._kept_of.get(layer)

    def pulls(self, layer: int, num_rows: int) -> tuple[Pulls, LastRows] | None:
        """Where the device leaves what it pulls, and which rows of it; None: it never does."""
        if layer not in self.layers:
            return None
        ids_TK, first_TK = self._ids_BK[:num_rows], self._first_BK[:num_rows]
        kept_N = self._kept_of[layer][: ids_TK.numel() + 1]
        most = min(self._width, int((self._width * np.arange(len(kept_N)) - kept_N).max()))
        if most == 0:
            return None
        place_E = self.rows.device_LE[layer]
        pulls = Pulls(self._kept_N, place_E, self._width, ids_TK, first_TK)
        return pulls, LastRows(first_TK, most, self._unit)


def _can_read(device: torch.device, at: LayerExperts) -> bool:
    if not len(at.cpu_w2_CHI):
        return False
    return device.type != "cuda" or all(part.is_pinned() for part in at.cpu_parts)

"""Cold experts of decode steps that the device reads from host memory by itself, over PCIe.

Pinned memory is mapped: kernels take the rows on the host like slots on the device. How many of a
step's cold experts they take is a table (:mod:`offload.cold_share`), which ones is found on the
device (:mod:`gpu_kernels.pulled_choices`).

Shapes: L layers, B rows of a step at most, K top-k, E experts, N counts of experts.
"""

import torch

from gpu_kernels.expert_weights import ExpertLayer
from gpu_kernels.hand_over import Pulls
from offload.cold_share import ShareCosts, pull_counts
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
        most = min(max_rows * top_k, shape.num_experts)
        self._store = store
        self._host_counts_N = pull_counts(most, store.expert_bytes, costs)
        self._counts_N = torch.from_numpy(self._host_counts_N).to(device)
        self._ids_BK = torch.empty((max_rows, top_k), dtype=torch.int32, device=device)
        self.rows = PlaceTable(store, "row_E", device)
        kernels_take_it = store.packed is not None or dtype in (store.dtype, torch.float32)
        self.layers = {
            layer: ExpertLayer(slot_weights(store[layer].cpu_parts, store.packed), reader=device)
            for layer in shape.moe_layers
            if kernels_take_it and _can_read(device, store[layer])
        }

    def pulls(self, layer: int, num_rows: int) -> Pulls | None:
        """Where the device leaves what it pulls; None: a step of so many rows never does."""
        if layer not in self.layers:
            return None
        ids_TK = self._ids_BK[:num_rows]
        most = min(ids_TK.numel(), len(self._store[layer].cpu_w2_CHI))
        return Pulls(self._counts_N, ids_TK) if self._host_counts_N[: most + 1].any() else None


def _can_read(device: torch.device, at: LayerExperts) -> bool:
    if not len(at.cpu_w2_CHI):
        return False
    return device.type != "cuda" or all(part.is_pinned() for part in at.cpu_parts)

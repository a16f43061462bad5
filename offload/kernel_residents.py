"""Residents of a GPU for a few tokens, or beside experts from disk: by the prompts' kernels.

Shapes: T tokens, K top-k, H hidden, E experts.
"""

import torch

from gpu_kernels.expert_config import prefill_config
from gpu_kernels.expert_weights import ExpertLayer
from gpu_kernels.grouped_gemm import grouped_experts
from offload.expert_store import ExpertStore
from offload.slot_weights import resident_layer


class KernelResidents:
    """A layer's slots stay where they are; which expert has which may change between steps."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self._layers: dict[int, ExpertLayer] = {}
        self._tables: dict[int, torch.Tensor] = {}  # of layers in which nothing can change

    def products(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """As for a prompt without cold experts."""
        num_experts, slots = self._store.shape.num_experts, self._slots(layer)
        expected = round(ids_TK.numel() * slots.num_slots / num_experts)  # all experts alike
        return grouped_experts(
            x_TH.contiguous(),
            ids_TK.int().contiguous(),
            weights_TK.contiguous(),
            self._slot_E(layer),
            slots,
            config=prefill_config(slots, expected, x_TH.dtype),
            num_slots=num_experts + 1,  # the most that a layer may have, with a spare one
        )

    def clear(self) -> None:
        """Nothing can be computed after."""
        self._layers.clear()
        self._tables.clear()

    def _slot_E(self, layer: int) -> torch.Tensor:
        """The layer's table now; to send it the host waits for all that is on the stream."""
        table = self._tables.get(layer)
        if table is None:
            at = self._store[layer]
            table = torch.from_numpy(at.slot_E).to(self._device)
            if not len(at.cpu_w2_CHI):
                self._tables[layer] = table
        return table

    def _slots(self, layer: int) -> ExpertLayer:
        """As the kernels take them; the products that are prepared for them stay there."""
        slots = self._layers.get(layer)
        if slots is None:
            slots = self._layers[layer] = resident_layer(self._store[layer])
        return slots

"""Residents of a GPU for a few tokens, or beside experts from disk: by the prompts' kernels.

Shapes: T tokens, K top-k, H hidden.
"""

import torch

from gpu_kernels.expert_weights import ExpertLayer
from gpu_kernels.grouped_gemm import grouped_experts
from offload.expert_store import ExpertStore
from offload.slot_weights import slot_weights


class KernelResidents:
    """A layer's slots stay where they are; which expert has which may change between steps."""

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self._layers: dict[int, ExpertLayer] = {}

    def products(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """One grouping of all pairs, then two launches for all slots."""
        experts = self._store[layer]
        slots = self._layers.get(layer)
        if slots is None:
            slots = ExpertLayer(slot_weights(experts.gpu_parts, experts.packed))
            self._layers[layer] = slots
        slot_E = torch.from_numpy(experts.slot_E).to(self._device)
        return grouped_experts(
            x_TH.contiguous(), ids_TK.int().contiguous(), weights_TK.contiguous(), slot_E, slots
        )

    def clear(self) -> None:
        """Nothing can be computed after."""
        self._layers.clear()

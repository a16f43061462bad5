"""Residents of a GPU for a few tokens, or beside experts from disk: by the prompts' kernels.

Shapes: T tokens, K top-k, H hidden, E experts.
"""

import torch

from gpu_kernels.expert_config import prefill_config
from gpu_kernels.expert_grouping import group_pairs
from gpu_kernels.expert_weights import ExpertLayer
from gpu_kernels.grouped_gemm import GroupedWorkspace, grouped_products
from gpu_kernels.sum_choices import sum_choices_of_tokens
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
        """Five launches, as for a prompt without cold experts; see ``gpu_kernels.grouped_gemm``."""
        num_experts = self._store.shape.num_experts
        slots, x_TH = self._slots(layer), x_TH.contiguous()
        ids_TK, weights_TK = ids_TK.int().contiguous(), weights_TK.contiguous()
        slot_E = torch.from_numpy(self._store[layer].slot_E).to(self._device)
        # one number of slots for all layers, so that one kernel is compiled: a spare one may exist
        groups = group_pairs(ids_TK, slot_E, num_experts + 1)
        num_pairs = ids_TK.numel()
        workspace = GroupedWorkspace.make(slots, num_pairs, x_TH.dtype)
        expected = round(num_pairs * slots.num_slots / num_experts)  # all experts alike, as there
        grouped_products(
            *(x_TH, ids_TK, groups, slots, workspace),
            config=prefill_config(slots, expected, x_TH.dtype),
            num_slots=slots.num_slots,
        )
        out_TH = torch.empty(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        sum_choices_of_tokens(workspace.part_PH, ids_TK, weights_TK, slot_E, out_TH)
        return out_TH

    def clear(self) -> None:
        """Nothing can be computed after."""
        self._layers.clear()

    def _slots(self, layer: int) -> ExpertLayer:
        """As the kernels take them; the products that are prepared for them stay there."""
        slots = self._layers.get(layer)
        if slots is None:
            at = self._store[layer]
            slots = self._layers[layer] = ExpertLayer(slot_weights(at.gpu_parts, at.packed))
        return slots

"""Slots on the device, or rows that it reads, as the expert kernels take them: dense or packed.

The parts of experts are tensors with one row for each: ``(w13, w2)``, or ``(blob,)`` if packed.
"""

from collections.abc import Sequence

import torch

from cpu_kernels.packed_layout import PackedShape
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer, PackedLayout, PackedWeights
from offload.expert_store import ExpertStore
from offload.layer_experts import LayerExperts
from offload.packed_expert import SCALES


def slot_weights(
    parts: Sequence[torch.Tensor], packed: PackedShape | None
) -> DenseWeights | PackedWeights:
    """Nothing is copied; there is at least one of them."""
    if packed is None:
        w13_SFH, w2_SHI = parts
        return DenseWeights(w13_SFH, w2_SHI)
    (blob_SB,) = parts
    return PackedWeights(blob_SB, packed_layout(packed))


def resident_layer(at: LayerExperts) -> ExpertLayer:
    """A layer's slots on the device, of which there is at least one."""
    return ExpertLayer(slot_weights(at.gpu_parts, at.packed))


def slots_of(parts: Sequence[torch.Tensor], packed: PackedShape | None) -> tuple[torch.Tensor, ...]:
    """Whole parts as :func:`empty_parts` gives them, for experts that may be smaller.

    They lie side by side from the beginning, so that one copy fills several.
    """
    if packed is None:
        return tuple(parts)
    (blob_SB,) = parts
    num_slots, size = len(blob_SB), packed.expert_bytes
    return (blob_SB.view(-1)[: num_slots * size].view(num_slots, size),)


def packed_layout(packed: PackedShape) -> PackedLayout:
    """The same sizes in the GPU kernels' words."""
    kind = packed.kind
    return PackedLayout(
        bits=kind.bits,
        group=kind.group,
        has_zeros=kind.has_zeros,
        scale_dtype=SCALES[kind.scales],
        hidden=packed.hidden,
        width=packed.width,
    )


def empty_parts(
    store: ExpertStore, num_slots: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Room for ``num_slots`` of the store's experts, of any layer; not initialised."""
    if store.is_packed:
        size = store.expert_bytes(store.largest_layer)
        return (torch.empty(num_slots, size, dtype=torch.uint8, device=device),)
    h, i = store.shape.hidden_size, store.shape.expert_size
    return (
        torch.empty(num_slots, 2 * i, h, dtype=store.dtype, device=device),
        torch.empty(num_slots, h, i, dtype=store.dtype, device=device),
    )

"""Slots on the device, or rows that it reads, as the expert kernels take them: dense or packed.

The parts of experts are tensors with one row for each: ``(w13, w2)``, or ``(blob,)`` if packed.
"""

from collections.abc import Sequence

import torch

from cpu_kernels.packed_layout import PackedShape
from gpu_kernels.expert_weights import DenseWeights, PackedLayout, PackedWeights
from offload.expert_store import ExpertStore
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
    """Room for ``num_slots`` of the store's experts, not initialised."""
    if store.packed is not None:
        size = store.packed.expert_bytes
        return (torch.empty(num_slots, size, dtype=torch.uint8, device=device),)
    h, i = store.shape.hidden_size, store.shape.expert_size
    return (
        torch.empty(num_slots, 2 * i, h, dtype=store.dtype, device=device),
        torch.empty(num_slots, h, i, dtype=store.dtype, device=device),
    )

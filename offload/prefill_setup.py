"""What a prompt's way through the experts needs on a GPU: ring, and times known or measured."""

import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.packed_layout import PackedShape
from offload.calibration import Calibration
from offload.expert_store import ExpertStore
from offload.expert_stream import ExpertStream
from offload.popularity import Popularity
from offload.prefill import PrefillExperts
from offload.prefill_costs import known_costs
from offload.prefill_division import PrefillCosts


def make_prefill(
    store: ExpertStore,
    pool: ExpertPool,
    calibration: Calibration,
    popularity: Popularity,
    *,
    num_slots: int,
    device: torch.device,
    dtype: torch.dtype,
    activations: Activations,
    max_tokens: int,
    top_k: int,
) -> PrefillExperts:
    """For a GPU: a ring of ``num_slots``, and both sides' times, which a first start measures.

    ``activations``: what the CPU rounds hidden states to.
    """
    stream = ExpertStream(store, num_slots, device) if num_slots > 0 else None
    costs: dict[PackedShape | None, PrefillCosts] = {}
    with_cold = [layer for layer in store.shape.moe_layers if len(store[layer].cpu_w13_CFH)]
    # each kind by the layer that has most of them on the host
    for layer in sorted(with_cold, key=lambda index: -len(store[index].cpu_w13_CFH)):
        at = store[layer]
        if at.packed not in costs:
            assert at.cpu_experts is not None
            costs[at.packed] = known_costs(
                calibration, pool, at.cpu_experts, activations, stream, layer
            )
    return PrefillExperts(
        *(store, pool, stream),
        {layer: costs[store[layer].packed] for layer in with_cold},
        popularity,
        device=device,
        dtype=dtype,
        activations=activations,
        max_tokens=max_tokens,
        top_k=top_k,
    )

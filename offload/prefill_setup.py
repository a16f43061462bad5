"""What a prompt's way through the experts needs on a GPU: ring, and times known or measured."""

import torch

from cpu_kernels.expert_pool import ExpertPool
from offload.calibration import Calibration
from offload.expert_store import ExpertStore
from offload.expert_stream import ExpertStream
from offload.popularity import Popularity
from offload.prefill import PrefillExperts
from offload.prefill_costs import known_costs, prefill_activations


def make_prefill(
    store: ExpertStore,
    pool: ExpertPool,
    calibration: Calibration,
    popularity: Popularity,
    *,
    num_slots: int,
    device: torch.device,
    dtype: torch.dtype,
    max_tokens: int,
    top_k: int,
) -> PrefillExperts:
    """For a GPU: a ring of ``num_slots``, and both sides' times, which a first start measures."""
    activations = prefill_activations(dtype, store.dtype)
    stream = ExpertStream(store, num_slots, device) if num_slots > 0 else None
    layer = max(store.shape.moe_layers, key=lambda index: len(store[index].cpu_w13_CFH))
    experts, costs = store[layer].cpu_experts, None
    if experts is not None:
        costs = known_costs(calibration, pool, experts, activations, stream, layer)
    return PrefillExperts(
        *(store, pool, stream, costs, popularity),
        device=device,
        dtype=dtype,
        activations=activations,
        max_tokens=max_tokens,
        top_k=top_k,
    )

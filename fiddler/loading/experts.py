"""Every expert to its one place, and what computes them there."""

import functools
import logging
import os

from fiddler._version import __version__
from fiddler.loading.ground import Ground
from fiddler.loading.opened import OpenedWeights
from fiddler.models.weights import load_expert_into
from offload.calibration import Calibration, default_path
from offload.executor import HybridExperts
from offload.expert_store import ExpertShape, ExpertStore, FillExpert
from offload.machine_facts import this_machine

_log = logging.getLogger("fiddler.loading")

# What is said of experts that memory has no room for.
HOW_THEY_COME = {
    "auto": "read from disk",
    "dummy": "drawn anew (a checkpoint's would be read from disk)",
}

# Readers copy from mapped files or draw numbers, without Python's lock: one a core.
LOAD_THREADS = max(4, os.cpu_count() or 1)


def load_experts(ground: Ground, weights: OpenedWeights) -> HybridExperts:
    """Read them all, or what memory holds, then learn or remember what they cost."""
    store = _fill_store(ground, weights)
    if ground.plan.cached is not None:
        held = ground.plan.placement.num_resident + ground.plan.cached.num_resident
        total = len(store.shape.moe_layers) * store.shape.num_experts
        _log.warning(
            "%d of %d experts have no room in memory and are %s when a step needs them",
            total - held,
            total,
            HOW_THEY_COME[ground.settings.load_format],
        )
    sizes = {"max_tokens": ground.step_tokens, "top_k": ground.config.top_k}
    prefill = None
    if ground.device.type == "cuda" and store.cache is None:
        from offload.prefill_setup import make_prefill  # triton wants a GPU

        prefill = make_prefill(
            store,
            ground.keeper.pool,
            Calibration(default_path(), this_machine(ground.hardware, __version__)),
            ground.plan.popularity,
            num_slots=ground.plan.staging_slots,
            device=ground.device,
            dtype=ground.dtype,
            activations=ground.dtypes.many,
            **sizes,
        )
    experts = HybridExperts(
        store,
        ground.keeper.pool,
        device=ground.device,
        prefill=prefill,
        activations=ground.dtypes.few,
        **sizes,
    )
    ground.resources.callback(experts.clear)
    return experts


def _fill_store(ground: Ground, weights: OpenedWeights) -> ExpertStore:
    config, on_progress = ground.config, ground.on_progress
    (kind, *_) = ground.dtypes.expert_kinds
    hidden, width = config.expert_sides
    moe_layers = [i for i in range(config.num_layers) if config.is_moe_layer(i)]
    store = ExpertStore(
        ExpertShape(
            num_layers=config.num_layers,
            moe_layers=moe_layers,
            num_experts=config.num_experts,
            hidden_size=hidden,
            expert_size=width,
        ),
        ground.plan.placement,
        device=ground.device,
        dtype=ground.expert_dtype,
        packed={i: config.packed_kind(kind, i) for i in moe_layers} if kind.is_packed else None,
        has_spares=ground.plan.spare_slots > 0,
        cached=ground.plan.cached,
    )
    ground.resources.callback(store.clear)

    if kind.is_packed:
        fill_expert: FillExpert = weights.packed(kind)
    else:
        fill_expert = functools.partial(load_expert_into, weights.numbers, config)
    # of all alike: experts of the last layers may take longer than it seems
    size = sum(map(store.expert_bytes, moe_layers)) / len(moe_layers)

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("experts", round(done * size), round(total * size))

    report(0, len(store.shape.moe_layers) * config.num_experts)
    store.fill(fill_expert, num_threads=LOAD_THREADS, on_progress=report)
    return store

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

# Readers copy from mapped files or draw numbers, without Python's lock: one a core.
LOAD_THREADS = max(4, os.cpu_count() or 1)


def load_experts(ground: Ground, weights: OpenedWeights) -> HybridExperts:
    """Read them all, or what memory holds, then learn or remember what they cost."""
    store = _fill_store(ground, weights)
    if store.cache is not None:
        _log.warning(
            "%d of %d experts have no room in memory and are read from disk when a step needs them",
            ground.plan.memory.disk_experts // store.expert_bytes,
            len(store.shape.moe_layers) * store.shape.num_experts,
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
            **sizes,
        )
    experts = HybridExperts(
        store, ground.keeper.pool, device=ground.device, prefill=prefill, **sizes
    )
    ground.resources.callback(experts.clear)
    return experts


def _fill_store(ground: Ground, weights: OpenedWeights) -> ExpertStore:
    config, on_progress = ground.config, ground.on_progress
    kind = ground.dtypes.expert_kind
    packed = kind if kind.is_packed else None
    hidden, width = config.expert_sides
    store = ExpertStore(
        ExpertShape(
            num_layers=config.num_layers,
            moe_layers=[i for i in range(config.num_layers) if config.is_moe_layer(i)],
            num_experts=config.num_experts,
            hidden_size=hidden,
            expert_size=width,
        ),
        ground.plan.placement,
        device=ground.device,
        dtype=ground.expert_dtype,
        packed=packed,
        has_spares=ground.plan.spare_slots > 0,
        cached=ground.plan.cached,
    )
    ground.resources.callback(store.clear)

    if packed is not None:
        fill_expert: FillExpert = weights.packed(packed)
    else:
        fill_expert = functools.partial(load_expert_into, weights.numbers, config)
    size = store.expert_bytes

    def report(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress("experts", done * size, total * size)

    report(0, len(store.shape.moe_layers) * config.num_experts)
    store.fill(fill_expert, num_threads=LOAD_THREADS, on_progress=report)
    return store

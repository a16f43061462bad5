"""Small models, machines and budgets, and their plans; random ones for property tests."""

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fiddler.errors import OutOfMemoryError
from offload.hardware import Hardware
from offload.placement import Placement
from offload.plan import Budget, Footprint, Plan
from offload.planner import plan
from offload.popularity import Popularity

MIB, GIB = 1 << 20, 1 << 30


def machine(**changes: Any) -> Hardware:
    """A machine with a 24 GiB GPU and 64 GiB of RAM, all of it free but the CUDA context."""
    fields: dict[str, Any] = {
        "has_gpu": True,
        "gpu_name": "Test GPU",
        "vram_total_bytes": 24 * GIB,
        "vram_free_bytes": 23 * GIB,
        "cuda_context_bytes": 512 * MIB,
        "ram_total_bytes": 64 * GIB,
        "ram_available_bytes": 60 * GIB,
        "physical_cores": 8,
        "cpu_name": "Test CPU",
    }
    return Hardware(**(fields | changes))


def without_gpu(**changes: Any) -> Hardware:
    """The same machine without its GPU."""
    no_gpu = {"has_gpu": False, "gpu_name": ""}
    no_vram = {"vram_total_bytes": 0, "vram_free_bytes": 0, "cuda_context_bytes": 0}
    return machine(**(no_gpu | no_vram | changes))


def less_free(hardware: Hardware) -> Hardware:
    """Some minutes later."""
    return replace(
        hardware,
        vram_free_bytes=hardware.vram_free_bytes * 49 // 50,
        ram_available_bytes=hardware.ram_available_bytes * 49 // 50,
    )


def model(**changes: Any) -> Footprint:
    """Four layers of eight 300 MiB experts around 2 GiB of dense weights, 64 MiB an embedding."""
    fields: dict[str, Any] = {
        "num_layers": 4,
        "num_experts": 8,
        "top_k": 2,
        "moe_layers": (0, 1, 2, 3),
        "expert_bytes": 300 * MIB,
        "dense_bytes": 2 * GIB,
        "dense_read_bytes": 2 * GIB - 64 * MIB,
        "kv_bytes_per_token": 64 << 10,
        "workspace_bytes": 100 * MIB,
        "step_tokens": 512,
    }
    return Footprint(**(fields | changes))


@st.composite
def models(draw: st.DrawFn, *, is_mixed: bool = False) -> Footprint:
    """``is_mixed``: experts of some layers may be larger than others."""
    num_layers = draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, 6))
    layers = draw(st.sets(st.integers(0, num_layers - 1), min_size=1))
    dense = draw(st.integers(1, GIB))
    largest = draw(st.integers(1, GIB))
    smaller = st.lists(st.integers(1, largest), min_size=len(layers), max_size=len(layers))
    sizes = draw(st.just([]) | smaller) if is_mixed else []
    return model(
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        moe_layers=tuple(sorted(layers)),
        expert_bytes=max(sizes, default=largest),
        layer_bytes=tuple(sizes),
        dense_bytes=dense,
        dense_read_bytes=draw(st.integers(1, dense)),
        kv_bytes_per_token=draw(st.integers(1, 64 << 10)),
        workspace_bytes=draw(st.integers(0, 256 * MIB)),
        host_bytes=draw(st.integers(0, 256 * MIB)),
    )


@st.composite
def machines(draw: st.DrawFn) -> Hardware:
    ram = draw(st.sampled_from([2 * GIB, 20 * GIB, 80 * GIB]))
    if draw(st.booleans()):
        return without_gpu(ram_total_bytes=ram + GIB, ram_available_bytes=ram)
    free = draw(st.sampled_from([GIB, 10 * GIB, 23 * GIB]))
    return machine(vram_free_bytes=free, ram_total_bytes=ram + GIB, ram_available_bytes=ram)


@st.composite
def budgets(draw: st.DrawFn) -> Budget:
    max_context = draw(st.integers(1, 100_000))
    return Budget(
        max_context=max_context,
        vram_bytes=draw(st.none() | st.integers(0, 10 * GIB)),
        ram_bytes=draw(st.none() | st.integers(0, 80 * GIB)),
        context_tokens=draw(st.none() | st.integers(1, max_context)),
        page_size=draw(st.sampled_from([1, 16])),
        max_num_seqs=draw(st.integers(1, 4)),
        spares_per_layer=draw(st.integers(0, 1)),
    )


@st.composite
def popularities(draw: st.DrawFn, num_layers: int, num_experts: int) -> Popularity:
    row = st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts)
    rows = draw(st.lists(row, min_size=num_layers, max_size=num_layers))
    return Popularity(np.array(rows, dtype=np.int64))


@st.composite
def placements(draw: st.DrawFn, footprint: Footprint) -> Placement:
    experts = st.sets(st.integers(0, footprint.num_experts - 1))
    return Placement.of(
        draw(experts) if layer in footprint.moe_layers else []
        for layer in range(footprint.num_layers)
    )


def planned(
    footprint: Footprint, hardware: Hardware, budget: Budget, placement: Placement | None = None
) -> Plan:
    """The plan where every expert counts the same."""
    popularity = Popularity.uniform(footprint.num_layers, footprint.num_experts)
    return plan(
        footprint, hardware, budget, popularity, popularity_name="uniform", placement=placement
    )


def planned_or_none(footprint: Footprint, hardware: Hardware, budget: Budget) -> Plan | None:
    """None where nothing fits."""
    try:
        return planned(footprint, hardware, budget)
    except OutOfMemoryError:
        return None

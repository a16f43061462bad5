"""Which experts live where and how long the context may be: pure arithmetic, or a refusal.

Experts are taken by expected use: no other choice of as many experts catches more. What a resident
expert spares the host is its use times its bytes, and its bytes are what it costs: so use alone
decides where experts of some layers are larger, too.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from fiddler.errors import ConfigError
from offload.hardware import Hardware
from offload.layout import Layout, lay_out
from offload.placement import Placement
from offload.plan import Budget, Footprint, GpuSide, MemoryBytes, Plan, TokenBytes
from offload.popularity import Popularity
from offload.refusal import (
    refuse_placement,
    refuse_ram,
    refuse_ram_budget,
    refuse_vram,
    refuse_vram_budget,
)
from offload.units import size_text

__all__ = ["Budget", "Footprint", "GpuSide", "MemoryBytes", "Plan", "TokenBytes", "plan"]


def plan(
    footprint: Footprint,
    hardware: Hardware,
    budget: Budget,
    popularity: Popularity,
    *,
    popularity_name: str,
    placement: Placement | None = None,
    stored_ratio: float = 1.0,
) -> Plan:
    """Place every expert, by ``placement`` if given, or raise before anything is allocated.

    ``stored_ratio``: bytes of an expert on disk for each that it takes in memory.

    Raises :class:`ConfigError` for a context beyond the model's or a placement of another model,
    and :class:`OutOfMemoryError` with the numbers and the nearest plan that fits where VRAM or RAM
    is short.
    """
    assert popularity.counts_LE.shape == (footprint.num_layers, footprint.num_experts)
    is_given = placement is not None
    if placement is not None:
        check_placement(placement, footprint)
        budget = replace(budget, gpu_experts=placement.num_resident)
    footprint = replace(footprint, order=_order(footprint, popularity, placement))
    layout = checked_layout(footprint, hardware, budget)
    if placement is None:
        placement = place(popularity, footprint.moe_layers, layout.num_gpu_experts)
    cached = _cached(footprint, layout, placement, popularity)
    hits_L = resident_shares(placement, popularity)
    hit_rate = _mean(hits_L, footprint)
    disk_L = _disk_rates(placement, cached, popularity)
    return Plan(
        gpu_side=layout.side,
        placement=placement,
        cached=cached,
        num_pages=layout.num_pages,
        page_size=budget.page_size,
        context_tokens=layout.context_tokens,
        memory=_memory(footprint, layout),
        per_token=_token_bytes(footprint, layout, hits_L, disk_L, stored_ratio),
        staging_slots=layout.staging_slots,
        spare_slots=layout.spare_slots,
        step_tokens=footprint.step_tokens,
        kv_divisor=budget.kv_divisor,
        vram_budget_bytes=layout.vram_limit,
        ram_needed_bytes=layout.ram_needed,
        ram_budget_bytes=layout.ram_limit,
        expected_hit_rate=hit_rate,
        popularity_name=popularity_name,
        popularity=popularity,
        notes=_notes(footprint, budget, layout, is_known=is_given or not popularity.is_uniform),
    )


def check_placement(placement: Placement, footprint: Footprint) -> None:
    """Raise :class:`ConfigError` where ``placement`` names what the model does not have."""
    num_layers = len(placement.resident)
    if num_layers != footprint.num_layers:
        raise ConfigError(
            f"the placement has {num_layers} layers, the model {footprint.num_layers}"
        )
    for layer, experts in enumerate(placement.resident):
        valid = range(footprint.num_experts if layer in footprint.moe_layers else 0)
        if wrong := sorted(e for e in experts if e not in valid):
            raise ConfigError(
                f"the placement names expert {wrong[0]} of layer {layer}, which has none such"
            )


def checked_layout(footprint: Footprint, hardware: Hardware, budget: Budget) -> Layout:
    """Return the layout of ``budget``; raises as :func:`plan` does."""
    asked = budget.context_tokens
    if asked is not None and asked > budget.max_context:
        raise ConfigError(
            f"a context of {asked:,} tokens was asked for, but the model's ends at "
            f"{budget.max_context:,}",
            hint=f"use --context {budget.max_context} or less",
        )
    layout = lay_out(footprint, hardware, budget)
    if layout.is_vram_overdrawn:
        raise refuse_vram_budget(hardware, layout)
    if layout.is_ram_overdrawn:
        raise refuse_ram_budget(hardware, budget)
    if layout.vram_missing:
        raise refuse_vram(footprint, hardware, budget, layout)
    if layout.expert_room_missing:
        raise refuse_placement(footprint, hardware, budget, layout)
    if layout.ram_missing:
        raise refuse_ram(footprint, hardware, budget, layout)
    return layout


def _order(
    footprint: Footprint, popularity: Popularity, placement: Placement | None
) -> tuple[int, ...]:
    """See :class:`Footprint`; a given placement's come first. (): sizes do not depend on it."""
    if not footprint.layer_bytes:
        return ()
    order = list(ranked(popularity, footprint.moe_layers))
    if placement is not None:
        order.sort(key=lambda item: item[1] not in placement.resident[item[0]])
    at = {layer: place for place, layer in enumerate(footprint.moe_layers)}
    return tuple(at[layer] for layer, _ in order)


def place(popularity: Popularity, moe_layers: Sequence[int], num_resident: int) -> Placement:
    """The ``num_resident`` most used experts; equally used ones are spread over ``moe_layers``.

    Spread, because a layer is fastest when both sides have work in it.
    """
    resident: list[set[int]] = [set() for _ in popularity.counts_LE]
    for layer, expert in ranked(popularity, tuple(moe_layers))[:num_resident]:
        resident[layer].add(expert)
    return Placement.of(resident)


@lru_cache(maxsize=2)  # many layouts of one model are compared
def ranked(popularity: Popularity, moe_layers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """All (layer, expert), the most used first."""
    shares_ME = popularity.shares()[list(moe_layers)]  # M: layers with experts
    order_ME = np.argsort(-shares_ME, axis=1, kind="stable")
    ranked_ME = np.take_along_axis(shares_ME, order_ME, axis=1)
    rank_ME = np.broadcast_to(np.arange(order_ME.shape[1]), order_ME.shape)
    # by share, ties by rank within the layer, further ties by layer (lexsort is stable)
    best = np.lexsort((rank_ME.ravel(), -ranked_ME.ravel()))
    places = zip(*np.unravel_index(best, order_ME.shape), strict=True)
    return tuple((moe_layers[row], int(order_ME[row, rank])) for row, rank in places)


def resident_shares(placement: Placement, popularity: Popularity) -> list[float]:
    """Per layer, the expected share of its routed tokens that meet a resident expert."""
    shares_LE = popularity.shares()
    return [
        float(shares_LE[layer, sorted(experts)].sum()) if experts else 0.0
        for layer, experts in enumerate(placement.resident)
    ]


def _cached(
    footprint: Footprint, layout: Layout, placement: Placement, popularity: Popularity
) -> Placement | None:
    """The cold experts that RAM begins with, the most used ones; None: it holds them all."""
    if not layout.num_disk_experts:
        return None
    cached: list[set[int]] = [set() for _ in placement.resident]
    order = ranked(popularity, footprint.moe_layers)
    cold = [(layer, e) for layer, e in order if e not in placement.resident[layer]]
    for layer, expert in cold[: layout.num_ram_experts]:
        cached[layer].add(expert)
    return Placement.of(cached)


def _mean(shares_L: Sequence[float], footprint: Footprint) -> float:
    return sum(shares_L[layer] for layer in footprint.moe_layers) / len(footprint.moe_layers)


def _disk_rates(
    placement: Placement, cached: Placement | None, popularity: Popularity
) -> list[float]:
    """Per layer, the expected share of routed tokens that meet an expert on disk."""
    if cached is None:
        return [0.0] * len(placement.resident)
    both = zip(placement.resident, cached.resident, strict=True)
    held = Placement.of(some | others for some, others in both)
    return [1.0 - share for share in resident_shares(held, popularity)]


def _memory(footprint: Footprint, layout: Layout) -> MemoryBytes:
    gpu_experts = layout.gpu_expert_bytes
    staging = layout.staging_slots * footprint.expert_bytes + layout.spare_bytes
    used = layout.vram_needed + staging + gpu_experts
    return MemoryBytes(
        context=layout.context_bytes,
        margin=layout.margin_bytes,
        dense=footprint.dense_bytes - layout.ram_dense_bytes,
        kv=layout.kv_bytes,
        workspace=footprint.workspace_bytes,
        staging=staging,
        gpu_experts=gpu_experts,
        cpu_workspace=layout.ram_workspace_bytes,
        cpu_dense=layout.ram_dense_bytes,
        cpu_experts=layout.ram_expert_bytes,
        disk_experts=layout.disk_expert_bytes,
        unused=0 if layout.side is GpuSide.NONE else layout.vram_limit - used,
    )


def _token_bytes(
    footprint: Footprint,
    layout: Layout,
    hits_L: Sequence[float],
    disk_L: Sequence[float],
    stored_ratio: float,
) -> TokenBytes:
    sizes = dict(zip(footprint.moe_layers, footprint.expert_bytes_M, strict=True))
    routed = footprint.top_k * sum(sizes.values())
    hot = round(footprint.top_k * sum(size * hits_L[layer] for layer, size in sizes.items()))
    from_disk = footprint.top_k * sum(size * disk_L[layer] for layer, size in sizes.items())
    return TokenBytes(
        hot_experts=hot,
        cold_experts=routed - hot,
        disk_experts=round(from_disk),
        disk_reads=round(stored_ratio * from_disk),
        dense=footprint.dense_read_bytes,
        kv=layout.context_tokens * footprint.kv_bytes_per_token,
    )


def _notes(
    footprint: Footprint, budget: Budget, layout: Layout, *, is_known: bool
) -> tuple[str, ...]:
    """What the figures do not say; ``is_known``: there was a reason to choose these experts."""
    notes = []
    if budget.gpu_experts is not None:
        notes.append("the placement was given, not chosen by use")
    if layout.side is GpuSide.EMULATED:
        notes.append("no GPU here: the CPU also computes the GPU side, which lives in RAM")
    if layout.side is GpuSide.NONE:
        where = "on the CPU side" if layout.num_disk_experts else "in RAM"
        notes.append(f"no GPU here and no VRAM budget: everything is {where}")
    elif layout.num_gpu_experts == footprint.total_experts:
        notes.append("every expert fits on the GPU side")
    elif layout.num_gpu_experts == 0 and budget.gpu_experts is None:
        notes.append("no expert fits on the GPU side: the CPU computes them all")
    elif not is_known:
        moves = "; while decoding, those in use move to the GPU" if layout.spare_slots else ""
        notes.append(f"no profile: every expert counts the same{moves}")
    if layout.num_disk_experts:
        notes.append(
            f"RAM holds {layout.num_ram_experts:,} experts at a time; others are read from disk "
            "when a step needs them"
        )
        if layout.num_ram_experts < footprint.num_experts:
            notes.append("RAM does not hold a whole layer: prompts read experts again and again")
        if layout.side is GpuSide.CUDA:
            notes.append(
                "with experts on disk, steps run without CUDA graphs and prompts on the CPU"
            )
    if budget.context_tokens is None and layout.context_tokens < budget.max_context:
        more = size_text(footprint.kv_bytes_per_token * 1024)
        notes.append(
            f"the model could hold {budget.max_context:,} tokens: --context N, {more} per 1,024"
        )
    return tuple(notes)

"""The promises of a plan that hold for every budget of VRAM, RAM and context."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import OutOfMemoryError
from offload.hardware import Hardware
from offload.placement import Placement
from offload.plan import Budget, Footprint, GpuSide
from offload.planner import plan
from offload.popularity import Popularity
from tests.offload.planner_cases import (
    GIB,
    MIB,
    budgets,
    machine,
    machines,
    model,
    models,
    planned,
    planned_or_none,
    without_gpu,
)


@given(models(is_mixed=True), machines(), budgets())
def test_a_plan_keeps_its_budgets(footprint: Footprint, hardware: Hardware, budget: Budget) -> None:
    made = planned_or_none(footprint, hardware, budget)
    if made is None:
        return
    memory = made.memory
    fixed = memory.context + memory.margin + memory.dense + memory.workspace
    page_bytes = budget.page_size * footprint.kv_bytes_per_token
    assert memory.kv == made.num_pages * page_bytes
    sizes_M = footprint.expert_bytes_M
    on_gpu = sum(
        len(made.placement.resident[layer]) * size
        for layer, size in zip(footprint.moe_layers, sizes_M, strict=True)
    )
    assert memory.gpu_experts == on_gpu
    assert memory.gpu_experts + memory.cpu_experts + memory.disk_experts == (
        footprint.num_experts * sum(sizes_M)
    )
    assert (made.cached is None) == (memory.disk_experts == 0)
    if made.cached is not None:
        most = made.cached.num_resident * footprint.expert_bytes
        assert memory.cpu_experts <= most and (footprint.layer_bytes or memory.cpu_experts == most)
        assert made.cached.num_resident >= footprint.top_k and memory.staging == 0
        assert made.ram_needed_bytes + footprint.expert_bytes > made.ram_budget_bytes
        both = zip(made.cached.resident, made.placement.resident, strict=True)
        assert not any(some & others for some, others in both)
    assert made.num_pages * budget.page_size >= made.context_tokens >= 1
    assert made.ram_needed_bytes <= made.ram_budget_bytes <= hardware.ram_available_bytes
    if budget.ram_bytes is not None:
        assert made.ram_needed_bytes <= budget.ram_bytes
    used = fixed + memory.kv + memory.gpu_experts + memory.staging
    spares = [sizes_M[n % len(sizes_M)] for n in range(made.spare_slots)]
    assert memory.staging == made.staging_slots * footprint.expert_bytes + sum(spares)
    assert made.spare_slots <= budget.spares_per_layer * len(footprint.moe_layers)
    if made.placement.num_resident and made.spare_slots:
        assert made.spare_slots == len(footprint.moe_layers)
    if made.gpu_side is not GpuSide.CUDA or memory.cpu_experts == 0:
        assert memory.staging == 0
    if made.gpu_side is GpuSide.NONE:
        assert made.placement.num_resident == made.vram_budget_bytes == memory.unused == 0
        assert made.ram_needed_bytes == used + memory.cpu_experts
    else:
        assert memory.unused >= 0
        assert used + memory.unused == made.vram_budget_bytes
    if hardware.has_gpu:
        assert made.vram_budget_bytes <= hardware.vram_free_bytes + hardware.cuda_context_bytes
        beside = memory.cpu_dense + memory.cpu_workspace
        assert made.ram_needed_bytes == beside + memory.cpu_experts
    assert memory.dense + memory.cpu_dense == footprint.dense_bytes
    assert memory.cpu_dense in ((0, footprint.lookup_bytes) if hardware.has_gpu else (0,))
    if hardware.has_gpu and memory.cpu_experts + memory.disk_experts:
        assert memory.cpu_dense == footprint.lookup_bytes
    is_shared = hardware.has_gpu and memory.cpu_experts > 0
    assert memory.cpu_workspace == (footprint.host_bytes if is_shared else 0)


@given(models(), machines(), budgets())
def test_the_context_is_what_was_asked_or_within_the_rule(
    footprint: Footprint, hardware: Hardware, budget: Budget
) -> None:
    made = planned_or_none(footprint, hardware, budget)
    if made is None:
        return
    if budget.context_tokens is not None:
        assert made.context_tokens == budget.context_tokens
        return
    most = min(budget.max_context, 32_768)
    assert min(2048, most) <= made.context_tokens <= most
    beyond_least = made.num_pages * budget.page_size >= 2048 + budget.page_size
    memory = made.memory
    holds_all = made.gpu_side is GpuSide.CUDA and not memory.cpu_experts + memory.disk_experts
    page_bytes = budget.page_size * footprint.kv_bytes_per_token
    if holds_all:  # requests have all they may want, or nothing is left that holds a page
        wanted = budget.max_num_seqs * -(-most // budget.page_size)
        assert made.num_pages >= wanted or memory.unused < 2 * page_bytes
    elif beyond_least and made.gpu_side is not GpuSide.NONE:
        left = memory.kv + memory.gpu_experts + memory.staging + memory.unused
        assert made.memory.kv <= left // 10


@given(models(is_mixed=True), budgets(), st.integers(GIB, 24 * GIB), st.integers(0, 2 * GIB))
def test_more_vram_never_means_fewer_experts_or_less_context(
    footprint: Footprint, budget: Budget, vram_bytes: int, more_bytes: int
) -> None:
    small = replace(budget, vram_bytes=vram_bytes, ram_bytes=None)
    large = replace(small, vram_bytes=vram_bytes + more_bytes)
    hardware = machine(vram_free_bytes=30 * GIB, ram_available_bytes=1000 * GIB)
    before, after = (planned_or_none(footprint, hardware, b) for b in (small, large))
    if before is None:
        return
    assert after is not None
    assert after.placement.num_resident >= before.placement.num_resident
    assert after.context_tokens >= before.context_tokens
    assert after.num_pages >= before.num_pages
    assert after.expected_hit_rate >= before.expected_hit_rate


@given(models(), st.integers(1, 24 * GIB), st.integers(1, 40_000))
def test_the_most_experts_that_fit_beside_an_asked_context(
    footprint: Footprint, vram_bytes: int, context: int
) -> None:
    budget = Budget(max_context=100_000, vram_bytes=vram_bytes, context_tokens=context)
    hardware = without_gpu(ram_available_bytes=1000 * GIB)
    made = planned_or_none(footprint, hardware, budget)
    kv = -(-context // 16) * 16 * footprint.kv_bytes_per_token
    fixed = footprint.dense_bytes + footprint.workspace_bytes + kv
    fitting = [
        n
        for n in range(footprint.total_experts + 1)
        if fixed + n * footprint.expert_bytes <= vram_bytes
    ]
    assert (made is None) == (not fitting)
    if made is not None:
        assert made.placement.num_resident == max(fitting)


def test_what_passes_through_comes_first_and_takes_a_small_part_of_a_large_room() -> None:
    """300 MiB experts: four slots; small ones have more, up to an eighth of the room."""
    nothing_else = {"dense_bytes": 1, "dense_read_bytes": 1, "workspace_bytes": 0}
    footprint = model(num_layers=16, moe_layers=tuple(range(16)), **nothing_else)
    wide = machine(vram_free_bytes=100 * GIB, ram_available_bytes=100 * GIB)

    def slots(vram_gib: int, spares: int = 0, size: int = 300) -> tuple[int, int]:
        budget = Budget(max_context=16, vram_bytes=vram_gib * GIB, spares_per_layer=spares)
        made = planned(replace(footprint, expert_bytes=size * MIB), wide, budget)
        return made.placement.num_resident, made.staging_slots

    assert slots(1) == (0, 0)
    assert slots(3) == (3, 4)
    assert slots(3, spares=1) == (0, 4)
    assert slots(6) == (13, 4)
    residents, staged = slots(24)
    assert staged == 4 and 70 < residents < 80
    assert slots(60) == (128, 0)
    assert slots(2, size=100) == (7, 4)
    assert slots(6, size=100) == (47, 5)


def test_spare_slots_are_paid_for_where_something_is_cold() -> None:
    def slots(vram_gib: int, spares: int) -> tuple[int, int, int]:
        budget = Budget(max_context=16, vram_bytes=vram_gib * GIB, spares_per_layer=spares)
        made = planned(model(), machine(), budget)
        return made.placement.num_resident, made.staging_slots, made.spare_slots

    residents, staged, spare = slots(8, 1)
    assert spare == 4 and sum(slots(8, 0)) == residents + staged + spare
    assert slots(20, 1) == (32, 0, 0)  # everything fits
    placement = Placement.of([range(4)] * 4)
    with pytest.raises(OutOfMemoryError, match="the placement's 16 experts take"):
        budget = Budget(max_context=16, vram_bytes=8 * GIB, spares_per_layer=1)
        planned(model(), machine(), budget, placement)
    planned(model(), machine(), Budget(max_context=16, vram_bytes=8 * GIB), placement)


def test_the_margin_is_taken_from_a_real_gpu_only() -> None:
    made = planned(model(), machine(), Budget(max_context=4096))
    footprint = model()
    pieces = (footprint.dense_read_bytes + footprint.workspace_bytes) // 32
    layers = 2 * MIB * footprint.num_layers
    assert made.memory.margin == 256 * MIB + 64 * MIB + layers + pieces
    assert made.memory.context == 512 * MIB


def test_an_embedding_comes_back_to_a_gpu_that_has_room_for_all_else() -> None:
    """64 MiB of it: before the GPU has that, more KV or the last experts take its place."""
    budget = Budget(max_context=4096, max_num_seqs=16)

    def where(mib: int) -> tuple[int, int, int]:
        made = planned(model(), machine(), replace(budget, vram_bytes=mib * MIB))
        return made.memory.cpu_experts, made.num_pages, made.memory.cpu_dense

    least = next(mib for mib in range(12_000, 20_000) if not where(mib)[0])
    most = next(mib for mib in range(least, 20_000) if not where(mib)[2])
    every_page = 16 * 4096 // 16
    assert where(least)[1] < every_page and where(least)[2] == 64 * MIB
    assert [where(mib)[1] for mib in (most - 1, most)] == [every_page] * 2
    poor = machine(ram_available_bytes=50 * MIB)
    made = planned(model(), poor, replace(budget, vram_bytes=(least + 64) * MIB))
    assert made.memory.cpu_dense == 0  # RAM has no room for it


def test_an_unasked_budget_leaves_half_a_gib_of_what_is_free() -> None:
    hardware = machine(vram_free_bytes=10 << 30, cuda_context_bytes=1 << 30)
    assert planned(model(), hardware, Budget(max_context=4096)).vram_budget_bytes == 21 << 29
    whole = Budget(max_context=4096, vram_bytes=11 << 30)
    assert planned(model(), hardware, whole).vram_budget_bytes == 11 << 30


def test_experts_beyond_the_ram_stay_on_disk() -> None:
    """300 MiB experts: three of them in 1 GiB, and 32 in all."""
    hardware = machine(ram_available_bytes=GIB)
    made = planned(model(), hardware, Budget(max_context=4096, vram_bytes=6 * GIB))
    assert made.cached is not None and made.cached.num_resident == 3
    on_disk = 32 - 3 - made.placement.num_resident
    assert made.memory.disk_experts == on_disk * 300 * MIB
    assert any("RAM holds 3 experts at a time" in note for note in made.notes)
    assert any("a whole layer" in note for note in made.notes)
    assert made.staging_slots == 0 and any("CUDA graphs" in note for note in made.notes)


def test_ram_begins_with_the_most_used_of_the_cold_experts() -> None:
    counts_LE = np.zeros((4, 8), np.int64)
    counts_LE[:, :3] = [[900, 50, 8], [90, 9, 1], [50, 30, 10], [10, 10, 10]]
    made = plan(
        model(),
        machine(ram_available_bytes=3 * GIB),
        Budget(max_context=4096, vram_bytes=4 * GIB, ram_bytes=2 * GIB),
        Popularity(counts_LE),
        popularity_name="a profile",
    )
    shares_LE = Popularity(counts_LE).shares()
    assert made.cached is not None and made.cached.num_resident == 6
    places = [(made.placement.resident[n], made.cached.resident[n]) for n in range(4)]
    hot = [shares_LE[n, e] for n, (some, _) in enumerate(places) for e in some]
    warm = [shares_LE[n, e] for n, (_, some) in enumerate(places) for e in some]
    cold = [shares_LE[n, e] for n, held in enumerate(places) for e in {*range(8)}.difference(*held)]
    assert min(hot) >= max(warm) >= min(warm) >= max(cold)
    routed = 4 * 2 * 300 * MIB
    assert made.per_token.disk_experts == pytest.approx(routed * sum(cold) / 4, abs=1)

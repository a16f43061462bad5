"""The planner against brute force, and the promises that hold for every budget."""

import itertools
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import ConfigError, OutOfMemoryError
from offload.hardware import Hardware
from offload.placement import Placement
from offload.plan import Budget, Footprint, GpuSide, Plan
from offload.planner import place, plan
from offload.popularity import Popularity
from offload.units import gib_to_bytes
from tests.offload.planner_cases import (
    GIB,
    MIB,
    budgets,
    machine,
    machines,
    model,
    models,
    placements,
    popularities,
    without_gpu,
)


def planned(
    footprint: Footprint, hardware: Hardware, budget: Budget, placement: Placement | None = None
) -> Plan:
    popularity = Popularity.uniform(footprint.num_layers, footprint.num_experts)
    return plan(
        footprint, hardware, budget, popularity, popularity_name="uniform", placement=placement
    )


def planned_or_none(footprint: Footprint, hardware: Hardware, budget: Budget) -> Plan | None:
    try:
        return planned(footprint, hardware, budget)
    except OutOfMemoryError:
        return None


# --- placement ---


@given(st.data())
def test_no_other_choice_of_as_many_experts_catches_more(data: st.DataObject) -> None:
    popularity = data.draw(popularities(3, 3))
    shares_LE = popularity.shares()
    everyone = [(layer, expert) for layer in (0, 2) for expert in range(3)]
    for count in range(len(everyone) + 1):
        placement = place(popularity, (0, 2), count)
        ours = sum(shares_LE[layer, e] for layer in range(3) for e in placement.resident[layer])
        best = max(
            sum(shares_LE[layer, e] for layer, e in chosen)
            for chosen in itertools.combinations(everyone, count)
        )
        assert placement.num_resident == count
        assert placement.resident[1] == frozenset()
        assert ours == pytest.approx(best)


@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_equal_experts_are_spread_over_the_layers(
    num_layers: int, num_experts: int, data: st.DataObject
) -> None:
    popularity = Popularity.uniform(num_layers, num_experts)
    count = data.draw(st.integers(0, num_layers * num_experts))
    placement = place(popularity, range(num_layers), count)
    sizes = [len(layer) for layer in placement.resident]
    assert sum(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@given(st.data())
def test_one_more_slot_evicts_nobody(data: st.DataObject) -> None:
    popularity = data.draw(popularities(4, 5))
    placements = [place(popularity, (0, 1, 3), n) for n in range(16)]
    for fewer, more in itertools.pairwise(placements):
        assert all(a <= b for a, b in zip(fewer.resident, more.resident, strict=True))


@given(st.data(), models(is_mixed=True), machines(), budgets())
def test_the_figures_of_a_given_placement_are_its_own(
    data: st.DataObject, footprint: Footprint, hardware: Hardware, budget: Budget
) -> None:
    popularity = data.draw(popularities(footprint.num_layers, footprint.num_experts))
    given_one = data.draw(placements(footprint))
    try:
        made = plan(
            footprint, hardware, budget, popularity, popularity_name="p", placement=given_one
        )
    except OutOfMemoryError:
        return
    on_gpu = on_cpu = on_disk = 0
    caught = 0.0
    hot = 0.0
    sizes = dict(zip(footprint.moe_layers, footprint.expert_bytes_M, strict=True))
    for layer, size in sizes.items():
        counts = [int(n) + 1 for n in popularity.counts_LE[layer]]
        for expert, count in enumerate(counts):
            if expert in given_one.resident[layer]:
                on_gpu += size
                caught += count / sum(counts)
                hot += footprint.top_k * size * count / sum(counts)
            elif made.cached is None or expert in made.cached.resident[layer]:
                on_cpu += size
            else:
                on_disk += size
    routed = footprint.top_k * sum(sizes.values())
    memory = made.memory
    assert made.placement == given_one
    assert memory.gpu_experts == on_gpu
    if made.cached is None or not footprint.layer_bytes:
        assert (memory.cpu_experts, memory.disk_experts) == (on_cpu, on_disk)
    else:  # as much as RAM needs whichever experts it holds
        assert memory.cpu_experts >= on_cpu
        assert memory.cpu_experts + memory.disk_experts == on_cpu + on_disk
        on_cpu = memory.cpu_experts
    assert made.expected_hit_rate == pytest.approx(caught / len(footprint.moe_layers))
    assert made.per_token.hot_experts == pytest.approx(hot, abs=1)
    assert made.per_token.hot_experts + made.per_token.cold_experts == routed
    rest = memory.dense + memory.workspace + memory.kv
    is_cuda = made.gpu_side is GpuSide.CUDA
    assert made.ram_needed_bytes == (on_cpu if is_cuda else rest + on_gpu + on_cpu)
    assert made.ram_needed_bytes <= made.ram_budget_bytes
    if made.gpu_side is not GpuSide.NONE:
        used = memory.context + memory.margin + rest + on_gpu + memory.staging
        assert memory.unused == made.vram_budget_bytes - used >= 0


@given(models(is_mixed=True), machines(), budgets())
def test_giving_the_chosen_placement_changes_nothing_but_the_notes(
    footprint: Footprint, hardware: Hardware, budget: Budget
) -> None:
    chosen = planned_or_none(footprint, hardware, budget)
    if chosen is None:
        return
    same = planned(footprint, hardware, budget, chosen.placement)
    assert replace(same, notes=()) == replace(chosen, notes=())
    assert "the placement was given, not chosen by use" in same.notes


# --- budgets ---


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
        assert made.ram_needed_bytes == memory.cpu_experts


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
    assert slots(2, size=100) == (8, 4)
    assert slots(6, size=100) == (48, 5)


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


# --- refusals ---


OPTION_FIELDS = {
    "--context": "context_tokens",
    "--vram-gb": "vram_bytes",
    "--ram-gb": "ram_bytes",
}


def changes_of(way: str) -> dict[str, int | None]:
    """Fields of a budget that the words of one way out change."""
    changes: dict[str, int | None] = {}
    for option, text in re.findall(r"(--[a-z-]+)(?: ([\d.e-]+))?", way):
        value = int(text) if text.isdigit() and option == "--context" else None
        if option != "--context" and text:
            value = gib_to_bytes(float(text))
        changes[OPTION_FIELDS[option]] = value
    return changes


@given(st.data(), models(), machines(), budgets())
def test_every_way_out_that_a_refusal_names_fits(
    data: st.DataObject, footprint: Footprint, hardware: Hardware, budget: Budget
) -> None:
    placement = data.draw(st.none() | placements(footprint))
    try:
        planned(footprint, hardware, budget, placement)
    except OutOfMemoryError as error:
        if "or leave it out" in error.hint:  # says what there is, not what fits
            return
        if error.hint.startswith("no budget"):
            other = replace(data.draw(budgets()), max_context=budget.max_context)
            context = data.draw(st.none() | st.integers(1, budget.max_context))
            other = replace(other, page_size=budget.page_size, context_tokens=context)
            assert planned_or_none(footprint, hardware, other) is None
            return
        for way in error.hint.split(" or "):
            kept = None if "another placement" in way else placement
            planned(footprint, hardware, replace(budget, **changes_of(way)), kept)


@pytest.mark.parametrize("vram_gib", [24.0, 60.0, 0.1, 1e-9])
@pytest.mark.parametrize("free_gib", [4, 11])
def test_a_gpu_side_in_ram_that_is_too_large_or_small_names_one_that_fits(
    vram_gib: float, free_gib: int
) -> None:
    budget = Budget(max_context=32_768, vram_bytes=max(1, gib_to_bytes(vram_gib)))
    hardware = without_gpu(ram_available_bytes=free_gib * GIB)
    footprint = model(expert_bytes=600 * MIB)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(footprint, hardware, budget)
    one, other = caught.value.hint.split(", or ")
    assert other == "leave out --vram-gb"
    nearest = changes_of(one)["vram_bytes"]
    assert nearest is not None
    assert planned(footprint, hardware, replace(budget, vram_bytes=nearest))
    assert planned(footprint, hardware, replace(budget, vram_bytes=None))
    further = nearest + GIB // 5 if vram_gib > 4 else nearest - GIB // 5
    assert planned_or_none(footprint, hardware, replace(budget, vram_bytes=further)) is None
    if vram_gib > 4:
        assert re.match(r"a GPU side of [\d.]+ GiB in RAM and one token's", caught.value.message)
        assert "tokens of context" not in caught.value.message


def test_where_no_option_alone_helps_several_are_named_that_do() -> None:
    budget = Budget(max_context=32_768, vram_bytes=GIB, ram_bytes=100 * MIB)
    footprint = model(expert_bytes=GIB)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(footprint, machine(), budget)
    assert caught.value.hint == "use --vram-gb 23.5 with --ram-gb 60.0"
    planned(footprint, machine(), replace(budget, **changes_of(caught.value.hint)))


def test_too_little_vram_names_the_numbers_and_the_nearest_plans() -> None:
    budget = Budget(max_context=32_768, vram_bytes=4 * GIB, context_tokens=32_000)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), machine(), budget)
    assert "has 4.0 GiB" in caught.value.message
    assert "dense weights 2.0 GiB" in caught.value.message
    assert "32,000 tokens of context 2.0 GiB" in caught.value.message
    assert re.fullmatch(r"use --context \d+ or --vram-gb [\d.]+", caught.value.hint)
    context = int(caught.value.hint.split()[2])
    planned(model(), machine(), replace(budget, context_tokens=context))
    with pytest.raises(OutOfMemoryError):
        planned(model(), machine(), replace(budget, context_tokens=context + 17))


def test_more_vram_than_the_gpu_has_is_refused() -> None:
    with pytest.raises(OutOfMemoryError, match=r"23.5 GiB of the 24.0 GiB") as caught:
        planned(model(), machine(), Budget(max_context=4096, vram_bytes=80 * GIB))
    assert "--vram-gb 23.5 or less" in caught.value.hint


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


def test_ram_has_to_hold_the_experts_of_a_token() -> None:
    hardware = machine(ram_available_bytes=500 * MIB)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), hardware, Budget(max_context=4096, vram_bytes=6 * GIB))
    assert caught.value.message == (
        "2 experts of 300 MiB, one token's, need 600 MiB of RAM, but 475 MiB may be used"
    )
    assert "--vram-gb" in caught.value.hint and "--ram-gb" not in caught.value.hint


NOTHING_RESIDENT = Placement.of([[]] * 4)
ALL_RESIDENT = Placement.of([range(8)] * 4)


def test_a_placement_that_leaves_too_much_to_the_ram_is_refused() -> None:
    hardware = machine(ram_available_bytes=500 * MIB)
    budget = Budget(max_context=4096)
    planned(model(), hardware, budget)  # on its own the planner fits: the VRAM holds all experts
    with pytest.raises(OutOfMemoryError, match="need 600 MiB of RAM, but 475 MiB") as caught:
        planned(model(), hardware, budget, NOTHING_RESIDENT)
    assert caught.value.hint == "use another placement"


@pytest.mark.parametrize("hardware", [machine(), without_gpu()], ids=["cuda", "emulated"])
def test_a_placement_beyond_the_vram_is_refused(hardware: Hardware) -> None:
    budget = Budget(max_context=4096, vram_bytes=6 * GIB)
    with pytest.raises(OutOfMemoryError, match=r"32 experts take 9.4 GiB of VRAM, but .* GiB of"):
        planned(model(), hardware, budget, ALL_RESIDENT)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([[0]] * 3, "3 layers, the model 4"),
        ([[], [8], [], []], "expert 8 of layer 1"),
        ([[], [-1], [], []], "expert -1 of layer 1"),
        ([[], [], [], [0]], "expert 0 of layer 3"),
    ],
    ids=["layers", "beyond", "negative", "dense layer"],
)
def test_a_placement_of_another_model_is_an_error(layers: list[list[int]], words: str) -> None:
    footprint = model(moe_layers=(0, 1, 2))
    with pytest.raises(ConfigError, match=words):
        planned(footprint, machine(), Budget(max_context=4096), Placement.of(layers))


def test_more_ram_than_the_machine_has_is_refused() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), machine(), Budget(max_context=4096, ram_bytes=80 * GIB))
    assert caught.value.message == "80.0 GiB of RAM were asked for, but the machine has 64.0 GiB"
    assert "--ram-gb 60.0 or less" in caught.value.hint


def test_an_asked_ram_budget_is_cut_to_what_is_free() -> None:
    budget = Budget(max_context=4096, ram_bytes=62 * GIB)
    assert planned(model(), machine(), budget).ram_budget_bytes == 60 * GIB
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), without_gpu(ram_available_bytes=2 * GIB), budget)
    assert caught.value.message == (
        "the model with 2,048 tokens of context and one token's experts needs 2.8 GiB of RAM, "
        "but 2.0 GiB of the 62.0 GiB asked for is free"
    )


def test_a_model_for_another_machine_has_no_way_out() -> None:
    huge = model(expert_bytes=40 * GIB)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(huge, machine(), Budget(max_context=4096))
    assert "no budget of the memory that is free" in caught.value.hint


def test_a_context_beyond_the_models_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the model's ends at 4,096"):
        planned(model(), machine(), Budget(max_context=4096, context_tokens=4097))


# --- what a plan says ---


def test_without_a_gpu_a_budget_emulates_one_and_none_is_needed() -> None:
    budget = Budget(max_context=4096, vram_bytes=6 * GIB)
    emulated = planned(model(), without_gpu(), budget)
    assert emulated.gpu_side is GpuSide.EMULATED
    assert emulated.memory.context == emulated.memory.margin == 0
    assert 0 < emulated.placement.num_resident < 32
    assert any("no GPU" in note for note in emulated.notes)
    plain = planned(model(), without_gpu(), replace(budget, vram_bytes=None))
    assert plain.gpu_side is GpuSide.NONE
    assert plain == planned(model(), without_gpu(), replace(budget, vram_bytes=0))


def test_the_margin_is_taken_from_a_real_gpu_only() -> None:
    made = planned(model(), machine(), Budget(max_context=4096))
    assert made.memory.margin > 192 * MIB
    assert made.memory.context == 512 * MIB


def test_an_unasked_budget_leaves_half_a_gib_of_what_is_free() -> None:
    hardware = machine(vram_free_bytes=10 << 30, cuda_context_bytes=1 << 30)
    assert planned(model(), hardware, Budget(max_context=4096)).vram_budget_bytes == 21 << 29
    whole = Budget(max_context=4096, vram_bytes=11 << 30)
    assert planned(model(), hardware, whole).vram_budget_bytes == 11 << 30


def test_bytes_per_token_follow_the_hit_rate() -> None:
    counts_LE = np.array([[90, 10, 0, 0, 0, 0, 0, 0]] * 4)
    made = plan(
        model(),
        machine(),
        Budget(max_context=4096, vram_bytes=7 * GIB),
        Popularity(counts_LE),
        popularity_name="a profile",
    )
    routed = 4 * 2 * 300 * MIB
    assert made.per_token.hot_experts + made.per_token.cold_experts == routed
    assert made.per_token.hot_experts == round(routed * made.expected_hit_rate)
    assert made.expected_hit_rate > 0.9  # 100 of 108 smoothed routes meet the two hot experts
    assert made.per_token.kv == made.context_tokens * (64 << 10)
    assert made.per_token.dense == GIB


def test_unknown_popularity_is_said() -> None:
    unknown = planned(model(), machine(), Budget(max_context=4096, vram_bytes=6 * GIB))
    assert "no profile: every expert counts the same" in unknown.notes
    known = plan(
        model(),
        machine(),
        Budget(max_context=4096, vram_bytes=6 * GIB),
        Popularity(np.arange(32).reshape(4, 8)),
        popularity_name="a profile",
    )
    assert not any("no profile" in note for note in known.notes)


def test_a_plan_survives_json() -> None:
    made = planned(model(), machine(), Budget(max_context=4096, vram_bytes=6 * GIB))
    record = json.loads(json.dumps(made.to_dict()))
    assert [set(layer) for layer in record["placement"]] == [
        set(layer) for layer in made.placement.resident
    ]
    assert record["gpu_side"] == "cuda"
    assert record["memory"]["kv"] == made.memory.kv


def test_512_experts_in_60_layers_take_well_under_a_second() -> None:
    footprint = model(num_layers=60, num_experts=512, moe_layers=tuple(range(60)), expert_bytes=MIB)
    counts_LE = np.random.default_rng(0).integers(0, 1000, (60, 512))
    started = time.thread_time()  # others' turns on a busy machine are no part of it
    plan(
        footprint,
        machine(),
        Budget(max_context=4096),
        Popularity(counts_LE),
        popularity_name="random",
    )
    assert time.thread_time() - started < 0.5  # 0.04 s on two cores

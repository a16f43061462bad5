"""The planner against brute force, and what its plans say."""

import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import OutOfMemoryError
from offload.hardware import Hardware
from offload.plan import Budget, Footprint, GpuSide
from offload.planner import place, plan
from offload.popularity import Popularity
from tests.offload.planner_cases import (
    GIB,
    MIB,
    budgets,
    machine,
    machines,
    model,
    models,
    placements,
    planned,
    planned_or_none,
    popularities,
    without_gpu,
)

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
    beside = memory.cpu_dense + memory.cpu_workspace if is_cuda else rest + on_gpu
    assert made.ram_needed_bytes == beside + on_cpu
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
    assert made.per_token.dense == made.memory.dense == 2 * GIB - 64 * MIB


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

"""The largest step and the ring: as asked, or those of the least predicted time."""

import re
import time
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.config import EngineConfig
from fiddler.errors import ConfigError, OutOfMemoryError
from fiddler.models.config import ModelConfig
from fiddler.models.shapes import SHAPES, load_shape
from fiddler.planning import (
    GPU_STEP_TOKENS,
    Sizes,
    answer,
    ask,
    candidates,
    plan_model,
    plan_s,
)
from fiddler.speed import RatesHere, demand_of
from offload.hardware import Hardware
from offload.objective import DEFAULT, parse_objective
from offload.objective_time import objective_s
from offload.plan import Plan
from offload.popularity import Popularity
from offload.prediction import predict_decode
from offload.prefill_prediction import predict_prefill
from offload.reference_machines import find_machine
from tests.offload.planner_cases import GIB, less_free, machine, without_gpu

USED = {
    name: RatesHere(rates=find_machine(name).rates, name=name, origin="")
    for name in ("h200-16core", "rtx4090-ddr5")
}
OBJECTIVES = ("decode", "prefill", "mix", DEFAULT, "mix:300:40", "mix:0:9", "mix:20000:1")


def planned(
    shape: str | ModelConfig,
    hardware: Hardware | None = None,
    used: str = "rtx4090-ddr5",
    **options: Any,
) -> Plan:
    config = load_shape(shape) if isinstance(shape, str) else shape
    plan, _ = plan_model(
        EngineConfig(**options),
        config,
        hardware or machine(),
        name="some",
        folder=None,
        used=USED[used],
    )
    return plan


# --- what is asked for, and where nothing is chosen ---


def test_what_was_asked_for_is_used() -> None:
    plan = planned("olmoe-1b-7b", vram_gb=6, max_batched_tokens=77)
    assert plan.step_tokens == 77
    placed = planned("olmoe-1b-7b", vram_gb=6, placement=plan.placement)
    assert placed.placement == plan.placement


@pytest.mark.parametrize("hardware", [without_gpu(), machine(), machine(cuda_context_bytes=0)])
def test_where_all_fits_nothing_is_chosen_and_no_rates_are_asked_for(hardware: Hardware) -> None:
    config = load_shape("olmoe-1b-7b")
    question = ask(EngineConfig(), config, hardware, name="o", folder=None)

    def no_rates() -> RatesHere:
        raise AssertionError

    plan = answer(question, no_rates)
    assert plan.chosen is None
    assert plan.step_tokens == (4096 if hardware.has_gpu else 2048)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_steps_hold_no_more_than_requests_have(has_gpu: bool) -> None:
    hardware = machine() if has_gpu else without_gpu()

    def step(**options: Any) -> int:
        return planned("olmoe-1b-7b", hardware, **options).step_tokens

    assert step(max_model_len=300, max_num_seqs=3) == 900
    assert step(max_model_len=7, max_num_seqs=1) == 33  # the least that streams experts
    assert step(max_model_len=300, max_num_seqs=3, max_batched_tokens=1234) == 1234
    assert step(max_num_seqs=1) >= 2048


# --- what is chosen ---


def best_by_hand(question: Any, used: RatesHere, asked_rows: int) -> float:
    """The least seconds of any candidate for a request of as many as it has room for at once, as
    the request's two parts are predicted."""
    is_batch = question.settings.max_model_len is not None and asked_rows > 1
    parts = (1, 2, 4, 10) if is_batch else (10,)
    slots = {sizes.slots for sizes in candidates(question)}
    settings, plans = question.settings, []
    # tokens that there may be, but no fewer than stream experts
    most = max((settings.max_model_len or 10**9) * settings.num_seqs, 33)
    for sizes in product({min(tokens, most) for tokens in GPU_STEP_TOKENS}, slots, parts):
        try:
            plans.append(question.plan(Sizes(*sizes)))
        except OutOfMemoryError:
            continue
    context = min(plan.context_tokens for plan in plans)
    asked = parse_objective(question.settings.objective).within(context)
    tokens = max(asked.prompt_tokens, asked.behind) + asked.answer_tokens
    found = []
    for plan in plans:
        demand = demand_of(question.model, question.dtypes, plan)
        rows = asked_rows  # all of them, or as many as the pages have tokens for
        while rows > 1 and rows * min(tokens, context) > plan.num_pages * plan.page_size:
            rows -= 1
        seconds = 0.0
        if asked.prompt_tokens:
            seconds += predict_prefill(
                demand, used.rates, num_tokens=asked.prompt_tokens, prompts=rows
            ).seconds
        if asked.answer_tokens:
            step = predict_decode(demand, used.rates, rows=rows, depth=asked.depth)
            seconds += asked.answer_tokens * step.seconds
        found.append(seconds / rows)
    return min(found)


@given(
    st.sampled_from(["olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"]),
    st.floats(4, 23),
    st.sampled_from(OBJECTIVES),
    st.sampled_from(["h200-16core", "rtx4090-ddr5"]),
    st.sampled_from(["auto", "w4g128"]),
    st.sampled_from([None, 700, 4000]),
    st.sampled_from([None, 1, 5, 40]),
    st.sampled_from([60, 12]),
    st.booleans(),
)
def test_no_other_layout_is_predicted_to_be_faster(
    shape: str,
    vram_gb: float,
    objective: str,
    name: str,
    dtype: str,
    context: int | None,
    seqs: int | None,
    ram_gib: int,
    has_profile: bool,
) -> None:
    settings = EngineConfig(
        vram_gb=vram_gb,
        objective=objective,
        dtype=dtype,
        max_model_len=context,
        max_num_seqs=seqs,
    )
    whole = load_shape(shape)
    config = replace(whole, num_layers=min(4 if shape == "mixtral-8x7b" else 9, whole.num_layers))
    hardware = machine(ram_available_bytes=ram_gib * GIB // 10)
    question = ask(settings, config, hardware, name="some", folder=None)
    if has_profile:
        counts = np.random.default_rng(0).integers(0, 99, (config.num_layers, config.num_experts))
        question = replace(question, popularity=Popularity(counts))
    used, rows = USED[name], seqs or 1
    try:
        plan = answer(question, lambda: used)
    except OutOfMemoryError:
        return
    if plan.chosen is None:
        return
    layouts = [question.layout(sizes) for sizes in candidates(question)]
    least = min(layout.context_tokens for layout in layouts if layout.fits)
    seconds, _ = plan_s(question, used, plan, context_tokens=least)
    assert seconds == pytest.approx(best_by_hand(question, used, rows), rel=1e-9)
    assert (plan.chosen.objective, plan.chosen.machine) == (objective, name)
    again = answer(question, lambda: used)
    assert again == plan


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_requests_that_have_no_room_do_not_count(objective: str) -> None:
    """Asked for or not, they wait: more of them make no plan better or worse."""
    settings = EngineConfig(vram_gb=20, objective=objective, max_num_seqs=64)
    config, used = load_shape("qwen3-30b-a3b"), USED["rtx4090-ddr5"]
    question = ask(settings, config, machine(), name="q", folder=None)
    plan = replace(question.plan(Sizes(1024, 16)), num_pages=32)
    more = replace(question, settings=replace(settings, max_num_seqs=128))
    few, many = (plan_s(q, used, plan, context_tokens=1024) for q in (question, more))
    assert few == many


@pytest.mark.parametrize("objective", ["decode", DEFAULT])
def test_kv_of_a_batch_takes_room_of_experts_where_that_pays(objective: str) -> None:
    """Of 64 requests a tenth of the room holds 19; their token takes as long as one of 64 does."""
    config, used = load_shape("qwen3-30b-a3b"), USED["rtx4090-ddr5"]
    settings = EngineConfig(max_model_len=1024, max_num_seqs=64, objective=objective)
    question = ask(settings, config, machine(), name="q", folder=None)
    plan = answer(question, lambda: used)
    tenth = question.plan(Sizes(plan.step_tokens, plan.staging_slots, 10))
    assert plan.num_pages == 64 * 1024 // 16 > 3 * tenth.num_pages
    few_s, all_s = (plan_s(question, used, p, context_tokens=1024)[0] for p in (tenth, plan))
    assert all_s < 0.6 * few_s
    alone = replace(settings, max_num_seqs=1)
    assert {sizes.kv_divisor for sizes in candidates(replace(question, settings=alone))} == {10}


def test_objectives_pull_in_their_direction() -> None:
    plans = {
        objective: planned("qwen3-30b-a3b", vram_gb=8, objective=objective)
        for objective in ("decode", "mix:1024:256", "prefill")
    }
    residents = [plan.placement.num_resident for plan in plans.values()]
    steps = [plan.step_tokens for plan in plans.values()]
    assert residents == sorted(residents, reverse=True) and len(set(residents)) == 3
    assert steps == sorted(steps) and steps[0] < 1024 < steps[-1]


def test_a_chat_unasked_keeps_large_steps_for_long_prompts() -> None:
    """A mix of short prompts would not: 3 times the time for half a percent of decode."""
    found = {}
    for objective in (DEFAULT, "mix"):
        plan = planned("qwen3-30b-a3b", vram_gb=20, objective=objective)
        config = load_shape("qwen3-30b-a3b")
        question = ask(EngineConfig(), config, machine(), name="q", folder=None)
        demand = demand_of(config, question.dtypes, plan)
        rates = USED["rtx4090-ddr5"].rates
        found[objective] = (
            predict_prefill(demand, rates, num_tokens=4096).seconds,
            predict_decode(demand, rates, rows=1, depth=1024).seconds,
        )
    (long_s, step_s), (short_long_s, short_step_s) = found[DEFAULT], found["mix"]
    assert short_long_s > 2.5 * long_s and step_s < 1.01 * short_step_s


def test_slower_links_make_prompts_count_for_more() -> None:
    slow = replace(USED["rtx4090-ddr5"].rates.peaks, pcie_gbps=3.0)
    used = RatesHere(rates=replace(USED["rtx4090-ddr5"].rates, peaks=slow), name="s", origin="")
    config = load_shape("qwen3-30b-a3b")
    settings = EngineConfig(vram_gb=8, objective="mix:2048:2048")
    question = ask(settings, config, machine(), name="q", folder=None)
    plan, fast = answer(question, lambda: used), answer(question, lambda: USED["h200-16core"])
    assert plan.step_tokens >= fast.step_tokens


@pytest.mark.parametrize("policy", ["static", "adaptive"])
@pytest.mark.parametrize("context_mib", range(500, 3500, 250))
def test_steps_get_smaller_before_prompts_lose_their_ring(context_mib: int, policy: str) -> None:
    """A context may grow to GiB: kernels that spill take local memory, and never give it back."""
    hardware = machine(cuda_context_bytes=context_mib << 20)
    options = {"vram_gb": 5, "max_model_len": 2100, "placement_policy": policy}
    try:
        plan = planned("olmoe-1b-7b", hardware, **options)
    except OutOfMemoryError:
        assert context_mib > 3000
        return
    assert plan.staging_slots >= 4 or plan.step_tokens == 512


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("vram_gb", [None, 4, 12, 24])
def test_every_shape_gets_a_step_of_the_list(name: str, vram_gb: float | None) -> None:
    hardware = machine(ram_total_bytes=200 * GIB, ram_available_bytes=200 * GIB)
    try:
        plan = planned(name, hardware, vram_gb=vram_gb and min(vram_gb, 23))
    except OutOfMemoryError:
        return
    assert plan.step_tokens in GPU_STEP_TOKENS
    large = vram_gb is None or vram_gb == 24
    assert not large or name not in ("qwen3-30b-a3b", "mixtral-8x7b") or plan.step_tokens == 4096


def test_the_plan_counts_the_activations_of_the_step() -> None:
    def workspace(max_batched_tokens: int | None) -> int:
        options = {"vram_gb": 16, "max_batched_tokens": max_batched_tokens}
        return planned("qwen3-30b-a3b", **options).memory.workspace

    chosen = planned("qwen3-30b-a3b", vram_gb=16).step_tokens
    assert workspace(None) == workspace(chosen) > workspace(chosen // 2)


@pytest.mark.parametrize("batch", [None, 64])
@pytest.mark.parametrize("has_profile", [False, True])
def test_512_experts_in_60_layers_are_compared_in_two_seconds(
    has_profile: bool, batch: int | None
) -> None:
    """0.4 s on two cores without a profile, 1.0 s where every layer differs."""
    config = replace(load_shape("qwen3-30b-a3b"), num_layers=60, num_experts=512)
    hardware = machine(ram_total_bytes=1 << 42, ram_available_bytes=1 << 42)
    settings = EngineConfig(max_num_seqs=batch, max_model_len=batch and 1024)
    question = ask(settings, config, hardware, name="some", folder=None)
    if has_profile:
        counts = np.random.default_rng(0).integers(0, 1000, (60, 512))
        question = replace(question, popularity=Popularity(counts))
    started = time.process_time()
    plan = answer(question, lambda: USED["rtx4090-ddr5"])
    assert plan.chosen is not None and plan.chosen.num_layouts >= 8
    assert time.process_time() - started < 2


# --- objectives ---


@pytest.mark.parametrize(
    ("text", "prompt", "answer_tokens"),
    [("decode", 0, 1), ("prefill", 4096, 0), ("mix", 1024, 256), ("mix:7:9", 7, 9)],
)
def test_an_objective_is_a_request(text: str, prompt: int, answer_tokens: int) -> None:
    found = parse_objective(text)
    assert (found.prompt_tokens, found.answer_tokens) == (prompt, answer_tokens)
    assert found.depth == found.behind + answer_tokens // 2


@given(st.integers(0, 9999), st.integers(0, 9999), st.integers(2, 9999))
def test_a_request_is_shortened_to_the_context_in_proportion(p: int, n: int, context: int) -> None:
    if p + n == 0:
        return
    short = parse_objective(f"mix:{p}:{n}").within(context)
    assert max(short.prompt_tokens, short.answer_tokens) == min(context, max(p, n))
    assert bool(short.prompt_tokens) == bool(p) and bool(short.answer_tokens) == bool(n)
    if context > 1000 and min(p, n) > 100:
        assert short.prompt_tokens * n == pytest.approx(short.answer_tokens * p, rel=0.2)


@pytest.mark.parametrize(
    "text", ["fast", "decode:1", "mix:1", "mix:-1:2", "mix:1:2:3", "mix:a:b", "mix:0:0", "", "mix:"]
)
def test_what_is_no_objective_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(objective=text)
    assert "mix:" in caught.value.hint and "\n" not in caught.value.message


def test_more_requests_take_longer_and_each_of_them_less() -> None:
    config = load_shape("qwen3-30b-a3b")
    question = ask(EngineConfig(vram_gb=8), config, machine(), name="q", folder=None)
    demand = demand_of(config, question.dtypes, question.plan(Sizes(4096, 16)))
    asked, rates = parse_objective("mix:512:64"), USED["h200-16core"].rates
    times = [objective_s(asked, demand, rates, rows=rows)[0] for rows in (1, 2, 4, 8)]
    assert times == sorted(times) and times[-1] < 8 * times[0]


# --- refusals ---


@pytest.mark.parametrize("value", [0, -1, float("inf"), "9", True])
def test_a_target_is_a_time(value: float) -> None:
    with pytest.raises(ConfigError, match="tbt_target_ms must be more than 0"):
        EngineConfig(tbt_target_ms=value)


@pytest.mark.parametrize(
    ("shape", "batch", "options"),
    [
        ("qwen3-30b-a3b", 9000, {}),
        ("qwen3-30b-a3b", 9000, {"max_model_len": 1024}),
        # steps that such requests can fill are larger the more of them there are
        ("olmoe-1b-7b", 31, {"dtype": "w4g128", "vram_gb": 1.7, "max_model_len": 16}),
        ("olmoe-1b-7b", 9, {"dtype": "w4g128", "vram_gb": 1.7, "max_model_len": 64}),
    ],
)
def test_a_batch_beyond_the_memory_names_the_largest_within_it(
    shape: str, batch: int, options: dict[str, Any]
) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        planned(shape, max_num_seqs=batch, **options)
    found = re.match(r"use --batch (\d+)", caught.value.hint)
    assert found is not None
    assert planned(shape, max_num_seqs=int(found[1]), **options)
    with pytest.raises(OutOfMemoryError):
        planned(shape, less_free(machine()), max_num_seqs=int(found[1]) + 1, **options)


def test_experts_on_disk_cannot_change_places() -> None:
    options: dict[str, Any] = {"vram_gb": 16, "ram_gb": 20}
    with pytest.raises(ConfigError, match="some are on disk") as caught:
        planned("qwen3-30b-a3b", placement_policy="adaptive", **options)
    assert "--ram-gb" in caught.value.hint
    plan = planned("qwen3-30b-a3b", **options)
    assert plan.cached is not None and plan.staging_slots == plan.spare_slots == 0

"""What more context costs and what would go faster: other plans, as if they had been asked for."""

import re
from dataclasses import replace
from itertools import chain, combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler import faster
from fiddler.advice import Case, Planned, make, price_of_context
from fiddler.config import EngineConfig
from fiddler.errors import OutOfMemoryError
from fiddler.faster import (
    LEAST_GAIN,
    Faster,
    Kind,
    cheapest,
    ways_to_go_faster,
    ways_to_have_room,
)
from fiddler.models.shapes import load_shape
from fiddler.planning import Sizes
from fiddler.speed import RatesHere
from offload.hardware import Hardware
from offload.reference_machines import find_machine
from offload.units import GIB

MACHINE = find_machine("rtx4090-ddr5")
USED = RatesHere(rates=MACHINE.rates, name=MACHINE.name, origin="")


def case(shape: str, hardware: Hardware = MACHINE.hardware, **options: Any) -> Case:
    settings = EngineConfig(model=shape, **options)
    model = load_shape(shape)
    return Case(
        settings=settings, model=model, hardware=hardware, name=shape, folder=None, used=USED
    )


# --- what context costs ---


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("qwen3-30b-a3b", {}),
        ("qwen3-30b-a3b", {"vram_gb": 12, "max_model_len": 8192, "dtype": "w4g128"}),
        ("mixtral-8x7b", {"max_num_seqs": 4, "max_model_len": 9000}),
    ],
)
def test_the_price_of_context_is_that_of_longer_plans(shape: str, options: dict[str, Any]) -> None:
    made = make(case(shape, **options))
    price = price_of_context(made)
    assert price is not None and price.tokens == 1024
    more = 8192
    longer = made.case.asking(max_model_len=made.plan.context_tokens + more)
    question = make(longer).question
    sizes = Sizes(made.plan.step_tokens, made.plan.staging_slots, made.plan.kv_divisor)
    plan = question.plan(sizes)
    lost = made.plan.placement.num_resident - plan.placement.num_resident
    assert price.experts == lost / 8 and price.decode_tokens_per_s >= 0
    assert (price.experts > 0) == (price.decode_tokens_per_s > 0)
    kv = question.needs(plan.step_tokens)
    if made.plan.num_pages * 16 - made.plan.context_tokens < 16:  # the cache holds one context
        room = 1024 * kv.kv_bytes_per_token / kv.expert_bytes
        assert price.experts == pytest.approx(room, abs=0.26)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("olmoe-1b-7b", {}),  # all fits
        ("qwen3-30b-a3b", {"max_model_len": 40_960}),  # the model's whole context
    ],
)
def test_where_nothing_can_be_had_for_room_there_is_no_price(
    shape: str, options: dict[str, Any]
) -> None:
    assert price_of_context(make(case(shape, **options))) is None
    without = replace(case(shape, **options), hardware=MACHINE.hardware.without_gpu())
    assert price_of_context(make(without)) is None


# --- ways to go faster ---

FIELDS = {
    "--context": ("max_model_len", int),
    "--batch": ("max_num_seqs", int),
    "--kv-dtype": ("kv_cache_dtype", str),
    "--dtype": ("dtype", str),
    "--vram-gb": ("vram_gb", float),
    "--ram-gb": ("ram_gb", float),
}


def as_asked(made: Planned, option: str) -> Planned:
    """The plan of someone who adds ``option`` to the command line."""
    flag, value = option.split()
    field, convert = FIELDS[flag]
    return make(made.case.asking(**{field: convert(value)}))


@pytest.mark.parametrize("objective", ["decode", "prefill", "mix:4096:1024"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("qwen3-30b-a3b", {"vram_gb": 20, "max_model_len": 32_768}),
        ("qwen3-30b-a3b", {"vram_gb": 12, "dtype": "w4g128"}),
        ("mixtral-8x7b", {"ram_gb": 32}),
        ("olmoe-1b-7b", {"vram_gb": 6, "max_num_seqs": 2}),
        ("olmoe-1b-7b", {"device": "cpu"}),
    ],
)
def test_what_is_proposed_is_what_the_option_gives(
    shape: str, options: dict[str, Any], objective: str
) -> None:
    hardware = MACHINE.hardware
    if options.get("device") == "cpu":
        hardware = hardware.without_gpu()
    made = make(case(shape, hardware, objective=objective, **options))
    ways = ways_to_go_faster(made)
    assert len(ways) <= 3 and (ways or objective == "prefill")
    gains = [way.gain for way in ways]
    assert gains == sorted(gains)
    for way in ways:
        assert way.gain >= LEAST_GAIN
        assert way.decode[0] == made.speeds.decode_rate
        if re.match("--", way.option):
            after = as_asked(made, way.option).speeds
            assert (way.decode[1], way.prefill[1]) == (after.decode_rate, after.prefill_rate)
        if objective != "prefill" or way.decode[1] < way.decode[0]:
            continue
        assert way.prefill[1] > way.prefill[0]


def test_bf12_is_proposed_where_nothing_else_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "cheapest", list)
    shape = case("qwen3-30b-a3b", vram_gb=20)
    for dtype in ("auto", "bfloat16", "float32", "bf12", "w8g128"):
        options = [way.option for way in ways_to_go_faster(make(shape.asking(dtype=dtype)))]
        assert ("--dtype bf12" in options) == (dtype == "auto"), dtype
    made = make(replace(shape, model=replace(shape.model, dtype="float16")))  # would be rounded
    assert "--dtype bf12" not in [way.option for way in ways_to_go_faster(made)]


def test_memory_is_proposed_where_rounding_is_done() -> None:
    packed = make(case("qwen3-30b-a3b", vram_gb=12, dtype="w4g128"))
    assert ways_to_go_faster(packed)[0].option == "--vram-gb 16.0"
    small = replace(MACHINE.hardware, vram_total_bytes=9 << 30, vram_free_bytes=8 << 30)
    poor = replace(small, ram_total_bytes=9 << 30, ram_available_bytes=8 << 30)
    on_disk = make(case("qwen3-30b-a3b", poor, dtype="w4g128"))
    assert on_disk.plan.cached is not None
    way = ways_to_go_faster(on_disk)[-1]
    assert re.fullmatch(r"\d+ GiB more RAM", way.option) and way.decode[1] > 2 * way.decode[0]
    asked = make(case("qwen3-30b-a3b", small, ram_gb=4, dtype="w4g128"))
    assert ways_to_go_faster(asked)[0].option.startswith("--ram-gb")


@given(
    shape=st.sampled_from(["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"]),
    objective=st.sampled_from(["decode", "prefill", "mix:4096:1024"]),
    dtype=st.sampled_from(["auto", "w4g128"]),
    vram=st.sampled_from([None, 4.0, 12.0]),
    batch=st.sampled_from([(None, None), (8, None), (8, 2048)]),
    share=st.floats(0.1, 0.9),
    has_gpu=st.booleans(),
)
@settings(max_examples=25)
def test_the_free_ram_that_is_proposed_is_as_good_as_no_bound(
    shape: str,
    objective: str,
    dtype: str,
    vram: float | None,
    batch: tuple[int | None, int | None],
    share: float,
    has_gpu: bool,
) -> None:
    hardware = MACHINE.hardware if has_gpu else MACHINE.hardware.without_gpu()
    seqs, context = batch
    asked = {"max_num_seqs": seqs, "max_model_len": context, "vram_gb": vram, "dtype": dtype}
    try:
        free = make(case(shape, hardware, objective=objective, **asked))
        made = make(free.case.asking(ram_gb=free.plan.ram_needed_bytes * share / GIB))
    except OutOfMemoryError:  # the GPU side or one token's experts do not fit
        return
    proposals = [way.option for way in tried(made) if way.cost == "RAM that is free"]
    if free.plan.cached is None:
        assert len(proposals) == (made.plan.cached is not None)
    for option in proposals:
        after = as_asked(made, option)
        assert after.speeds.decode_rate >= free.speeds.decode_rate
        assert after.speeds.prefill_rate >= free.speeds.prefill_rate


@pytest.mark.parametrize("batch", [None, 8])
@pytest.mark.parametrize("shape", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_ram_to_buy_is_enough_for_all_experts(shape: str, batch: int | None) -> None:
    poor = replace(MACHINE.hardware, ram_total_bytes=25 * GIB, ram_available_bytes=24 * GIB)
    made = make(case(shape, poor, max_num_seqs=batch))
    [bought] = [way for way in tried(made) if way.cost == "memory to buy"]
    more = int(bought.option.split()[0]) * GIB
    fewer = replace(poor, ram_available_bytes=poor.ram_available_bytes + more - 8 * GIB)
    assert make(replace(made.case, hardware=fewer)).plan.cached is not None
    roomy = make(replace(made.case, hardware=MACHINE.hardware))
    assert bought.decode[1] == roomy.speeds.decode_rate
    assert bought.prefill[1] == roomy.speeds.prefill_rate


def tried(made: Planned) -> list[Faster]:
    """All ways with what they gain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster, "cheapest", list)
        return ways_to_go_faster(made)


@pytest.mark.parametrize("context", [4096, 2048, 2046, 1536, 1024])
def test_half_the_context_is_proposed_down_to_1024_tokens(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a budget so small that half of any of these gains enough to be shown."""
    proposals = [one for one in faster.PROPOSALS if one[0] is Kind.CONTEXT]
    monkeypatch.setattr(faster, "PROPOSALS", proposals)
    made = make(case("olmoe-1b-7b", vram_gb=2.3, dtype="w4g128", max_model_len=context))
    found = [way.option for way in ways_to_go_faster(made)]
    assert found == ([f"--context {context // 2}"] if context >= 2048 else [])
    monkeypatch.setattr(faster, "LEAST_CONTEXT", 1)
    assert [way.option for way in ways_to_go_faster(made)] == [f"--context {context // 2}"]


GAINS = st.floats(-0.5, 2) | st.sampled_from([0.1, 0.5])


@given(st.lists(st.tuples(st.sampled_from(Kind), GAINS), max_size=9))
def test_the_one_that_gains_most_and_the_cheapest_before_it_are_shown(
    found: list[tuple[Kind, float]],
) -> None:
    ways = [
        Faster(kind=kind, option=str(n), cost="", decode=(1, 1), prefill=(1, 1), gain=gain)
        for n, (kind, gain) in enumerate(found)
    ]
    worth = [way for way in ways if way.gain >= LEAST_GAIN]
    adding = [
        way for n, way in enumerate(worth) if not any(way.gain <= other.gain for other in worth[:n])
    ]

    def preferred(chosen: tuple[Faster, ...]) -> tuple[Any, ...]:
        """The largest gain above all, then many, of many kinds, of which cheap ones."""
        places = [-ways.index(way) for way in chosen]
        kinds = {way.kind for way in chosen}
        return max((way.gain for way in chosen), default=0), len(chosen), len(kinds), places

    possible = chain.from_iterable(combinations(adding, n) for n in range(4))
    assert tuple(cheapest(ways)) == max(possible, key=preferred)


@pytest.mark.parametrize("options", [{}, {"vram_gb": 12}, {"vram_gb": 12, "ram_gb": 20}])
def test_what_gains_most_is_shown(options: dict[str, Any]) -> None:
    made = make(case("qwen3-30b-a3b", **options))
    most = max(tried(made), key=lambda way: way.gain)
    assert ways_to_go_faster(made)[-1] == most and most.option == "--dtype w4g128"


def test_memory_to_buy_is_shown_where_nothing_else_gains_as_much() -> None:
    for gib, is_shown in ((20, False), (8, True)):  # all of w4g128 beside 8 of VRAM, or not
        small = replace(MACHINE.hardware, vram_free_bytes=8 << 30, ram_available_bytes=gib << 30)
        ways = ways_to_go_faster(make(case("qwen3-30b-a3b", small)))
        assert (ways[-1].cost == "memory to buy") == is_shown, ways


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"max_model_len": 40_960}, [Kind.CONTEXT, Kind.KV, Kind.EXPERTS]),
        ({"vram_gb": 12, "max_model_len": 40_960}, [Kind.MEMORY, *[Kind.EXPERTS] * 2]),
        ({"ram_gb": 20}, [Kind.MEMORY, *[Kind.EXPERTS] * 2]),
    ],
)
def test_what_is_free_comes_before_what_rounds(options: dict[str, Any], kinds: list[Kind]) -> None:
    ways = ways_to_go_faster(make(case("qwen3-30b-a3b", **options)))
    assert [way.kind for way in ways] == kinds


# --- requests at once ---


def test_a_batch_gives_the_cache_room_and_is_predicted_as_one() -> None:
    one, four = (
        make(case("olmoe-1b-7b", max_model_len=2048, max_num_seqs=batch)) for batch in (1, 4)
    )
    assert one.plan.num_pages < four.plan.num_pages
    assert (one.speeds.rows, four.speeds.rows, four.speeds.num_tokens) == (1, 4, 2048)
    assert one.speeds.decode_rate < four.speeds.decode_rate < 4 * one.speeds.decode_rate
    crowded = make(case("qwen3-30b-a3b", max_model_len=30_000, max_num_seqs=9))
    assert crowded.speeds.rows == 1  # the cache holds no two of them


def test_deeper_contexts_decode_slower() -> None:
    rates = [
        make(case("olmoe-1b-7b", max_model_len=context)).speeds.decode_rate
        for context in (512, 2048, 4096)
    ]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 3


# --- room for all requests ---

AS_OPTIONS = {
    "--context": ("max_model_len", int),
    "--kv-dtype": ("kv_cache_dtype", str),
    "--dtype": ("dtype", str),
    "--vram-gb": ("vram_gb", float),
}


@pytest.mark.parametrize(
    ("batch", "options", "flags"),
    [
        (64, {}, {"--kv-dtype"}),
        (9, {"max_model_len": 8192}, {"--context", "--kv-dtype"}),
        (45, {"vram_gb": 12.0, "dtype": "w4g128", "kv_cache_dtype": "int4"}, {"--vram-gb"}),
        (4, {"max_model_len": 4096}, set()),
        (None, {}, set()),
    ],
)
def test_with_each_option_that_gives_room_nobody_waits(
    batch: int | None, options: dict[str, Any], flags: set[str]
) -> None:
    made = make(case("qwen3-30b-a3b", max_num_seqs=batch, **options))
    ways = [way.split() for way in ways_to_have_room(made)]
    assert {flag for flag, _ in ways} == flags and len(ways) == len(flags)
    for flag, value in ways:
        field, as_type = AS_OPTIONS[flag]
        after = make(made.case.asking(**{field: as_type(value)}))
        assert after.speeds.rows == batch
        tokens = int(value) if flag == "--context" else made.speeds.num_tokens
        assert after.speeds.num_tokens == tokens

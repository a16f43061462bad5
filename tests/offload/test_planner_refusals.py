"""What cannot be planned is refused with its numbers, and with ways out that fit."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import ConfigError, OutOfMemoryError
from offload.hardware import Hardware
from offload.placement import Placement
from offload.plan import Budget, Footprint
from offload.units import gib_to_bytes
from tests.offload.planner_cases import (
    GIB,
    MIB,
    budgets,
    less_free,
    machine,
    machines,
    model,
    models,
    placements,
    planned,
    planned_or_none,
    without_gpu,
)

OPTION_FIELDS = {
    "--context": "context_tokens",
    "--vram-gb": "vram_bytes",
    "--ram-gb": "ram_bytes",
    "--batch": "max_num_seqs",
}


def changes_of(way: str) -> dict[str, Any]:
    """Fields of a budget that the words of one way out change."""
    changes: dict[str, Any] = {}
    for option, text in re.findall(r"(--[a-z-]+)(?: ([\d.e-]+))?", way):
        if option in ("--context", "--batch"):
            value = int(text)
        else:
            value = gib_to_bytes(float(text)) if text else None
        changes[OPTION_FIELDS[option]] = value
    return changes


@given(st.data(), models(), machines(), budgets(), st.integers(0, GIB), st.booleans())
def test_every_way_out_that_a_refusal_names_fits(
    data: st.DataObject,
    one: Footprint,
    hardware: Hardware,
    budget: Budget,
    row_bytes: int,
    is_batch: bool,
) -> None:
    def for_batch(batch: int) -> Footprint:
        return replace(one, workspace_bytes=one.workspace_bytes + batch * row_bytes)

    budget = replace(budget, for_batch=for_batch if is_batch else None)
    asked = budget.max_num_seqs
    footprint = for_batch(asked)
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
            changed = replace(budget, **changes_of(way))
            assert changed.max_num_seqs == asked or is_batch
            planned(for_batch(changed.max_num_seqs), hardware, changed, kept)
            if changed.max_num_seqs < asked - 1:  # the most that fit
                more = replace(budget, max_num_seqs=changed.max_num_seqs + 1)
                with pytest.raises(OutOfMemoryError):
                    planned(for_batch(more.max_num_seqs), less_free(hardware), more, kept)


@given(st.integers(4 * GIB, 60 * GIB), st.integers(MIB, 60 * GIB), st.booleans())
def test_a_way_out_by_what_is_free_still_fits_when_some_of_it_has_gone(
    free: int, asked: int, is_gpu_side: bool
) -> None:
    hardware = without_gpu(ram_available_bytes=free)
    budget = Budget(max_context=1 << 20, ram_bytes=None if is_gpu_side else 64 * GIB)
    changes = {"vram_bytes": asked} if is_gpu_side else {"context_tokens": asked // 62_000}
    budget = replace(budget, **changes)
    try:
        planned(model(), hardware, budget)
    except OutOfMemoryError as error:
        for way in re.split(", or | or ", error.hint):
            planned(model(), less_free(hardware), replace(budget, **changes_of(way)))


def test_a_way_out_by_what_was_asked_for_uses_all_of_it() -> None:
    for hardware, asked in (
        (without_gpu(), {"ram_bytes": 4 * GIB}),
        (machine(), {"vram_bytes": 4 * GIB}),
        (machine(), {"vram_bytes": 23 * GIB + GIB // 2}),  # all that can be had
    ):
        budget = Budget(max_context=1 << 20, context_tokens=1 << 20, **asked)
        tokens = changes_of(refused(hardware, budget))["context_tokens"]
        planned(model(), hardware, replace(budget, context_tokens=tokens))
        more = replace(budget, context_tokens=tokens + 16)
        assert planned_or_none(model(), hardware, more) is None


def test_all_that_is_free_is_named_where_less_does_not_do() -> None:
    budget = Budget(max_context=4096, context_tokens=1, ram_bytes=MIB)
    roomy = refused(without_gpu(), budget)
    assert re.fullmatch(r"use --ram-gb [\d.]+", roomy)
    just = without_gpu(ram_available_bytes=changes_of(roomy)["ram_bytes"])
    assert refused(just, budget) == roomy
    planned(model(), just, replace(budget, **changes_of(roomy)))


def refused(hardware: Hardware, budget: Budget) -> str:
    """The hint."""
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), hardware, budget)
    return caught.value.hint


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
    later = less_free(hardware)
    assert planned_or_none(footprint, later, replace(budget, vram_bytes=further)) is None
    if vram_gib > 4:
        assert re.match(r"a GPU side of [\d.]+ GiB in RAM and one token's", caught.value.message)
        assert "tokens of context" not in caught.value.message


def test_where_no_option_alone_helps_several_are_named_that_do() -> None:
    budget = Budget(max_context=32_768, vram_bytes=GIB, ram_bytes=100 * MIB)
    footprint = model(expert_bytes=GIB)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(footprint, machine(), budget)
    assert caught.value.hint == "use --vram-gb 23.0 with --ram-gb 58.8"
    planned(footprint, machine(), replace(budget, **changes_of(caught.value.hint)))


def test_too_little_vram_names_the_numbers_and_the_nearest_plans() -> None:
    budget = Budget(max_context=32_768, vram_bytes=4 * GIB, context_tokens=32_000)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), machine(), budget)
    assert "has 4.0 GiB" in caught.value.message
    assert "dense weights 1.9 GiB" in caught.value.message
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


def test_ram_has_to_hold_the_experts_of_a_token() -> None:
    hardware = machine(ram_available_bytes=500 * MIB)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(model(), hardware, Budget(max_context=4096, vram_bytes=6 * GIB))
    assert caught.value.message == (
        "one token's 2 experts of 300 MiB and 64.0 MiB of input embedding need 664 MiB of RAM, "
        "but 475 MiB may be used"
    )
    with pytest.raises(OutOfMemoryError) as caught:
        needs = model(host_bytes=50 * MIB)
        planned(needs, hardware, Budget(max_context=4096, vram_bytes=6 * GIB))
    assert caught.value.message.startswith(
        "one token's 2 experts of 300 MiB, 50.0 MiB of workspace and 64.0 MiB of input embedding "
        "need 714 MiB of RAM"
    )
    assert "--vram-gb" in caught.value.hint and "--ram-gb" not in caught.value.hint


NOTHING_RESIDENT = Placement.of([[]] * 4)
ALL_RESIDENT = Placement.of([range(8)] * 4)


def test_a_placement_that_leaves_too_much_to_the_ram_is_refused() -> None:
    hardware = machine(ram_available_bytes=500 * MIB)
    budget = Budget(max_context=4096)
    planned(model(), hardware, budget)  # on its own the planner fits: the VRAM holds all experts
    with pytest.raises(OutOfMemoryError, match="need 664 MiB of RAM, but 475 MiB") as caught:
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

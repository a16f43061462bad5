"""Options that make a plan fit which does not.

Each is tried with the same arithmetic before it is named. Fitting is monotonic in each budget but
in that of a GPU side which the CPU plays: it is RAM too, so that more of it may be too much.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

from offload.hardware import Hardware
from offload.layout import Layout, context_range, lay_out, usable_vram_bytes
from offload.plan import Budget, Footprint
from offload.units import GIB, gib_at_least, gib_at_most, gib_to_bytes

NO_VRAM = "leave out --vram-gb"

# What is free moves: "use --vram-gb 21.3", all of a machine's RAM, was refused some minutes later,
# when 0.4 GiB of it had gone. So a hint leaves 1/50.
SLACK_DIVISOR = 50

LayOut = Callable[[Budget], Layout]
Way = tuple[str, dict[str, Any]]  # what to use, and the budget's fields that it changes


def nearest_plan(footprint: Footprint, hardware: Hardware, budget: Budget) -> str:
    """Name each option that alone makes the plan fit, changed as little as possible.

    Where none does alone, several of them together. All of what is free is used only where less of
    it does not do.
    """
    for there in (_less_free(hardware, budget), hardware):
        if way := _way_out(footprint, there, budget):
            return way
    smaller = "model or dtype" if budget.for_batch is None else "batch, model or dtype"
    return f"no budget of the memory that is free makes it fit: choose a smaller {smaller}"


def _less_free(hardware: Hardware, budget: Budget) -> Hardware:
    """``hardware`` with less of its memory free, but as much VRAM as was asked for."""
    free = hardware.vram_free_bytes
    asked = min(free, (budget.vram_bytes or 0) - hardware.cuda_context_bytes)
    ram = hardware.ram_available_bytes
    return replace(
        hardware,
        vram_free_bytes=max(free - free // SLACK_DIVISOR, asked),
        ram_available_bytes=ram - ram // SLACK_DIVISOR,
    )


def _way_out(footprint: Footprint, hardware: Hardware, budget: Budget) -> str:
    """Options that fit, or an empty string."""
    tried = partial(lay_out, footprint, hardware)
    ways = [_smaller_batch(footprint, hardware, budget), *_single_ways(tried, hardware, budget)]
    alone = [way for way in ways if way]
    if alone:
        left_out = [way for way in alone if way == NO_VRAM]
        used = " or ".join(way for way in alone if way != NO_VRAM)
        return ", or ".join([f"use {used}"] * bool(used) + left_out)
    return _several(tried, hardware, budget)


def _single_ways(tried: LayOut, hardware: Hardware, budget: Budget) -> Iterator[str]:
    """Each with one thing changed, or an empty string."""

    def fits(**changes: Any) -> bool:
        return tried(replace(budget, **changes)).fits

    yield _shorter_context(tried, budget)
    if hardware.has_gpu:
        most = usable_vram_bytes(hardware)
        yield _more_gib("--vram-gb", most, lambda size: fits(vram_bytes=size))
    elif budget.vram_bytes:
        yield _emulated_gib(tried, hardware, budget)
        yield NO_VRAM if fits(vram_bytes=None) else ""
    yield _more_gib("--ram-gb", hardware.ram_available_bytes, lambda size: fits(ram_bytes=size))
    if budget.gpu_experts is not None:
        yield "another placement" if fits(gpu_experts=None) else ""


def _several(tried: LayOut, hardware: Hardware, budget: Budget) -> str:
    """The fewest of: all the memory there is, another placement, a shorter context."""
    for text in (gib_at_most, _exact_gib):
        ways = list(_most_of_all(hardware, budget, text))
        for count in range(1, len(ways) + 1):
            for some in combinations(ways, count):
                if way := _together(tried, budget, some):
                    return way
    return ""


def _together(tried: LayOut, budget: Budget, some: Sequence[Way]) -> str:
    """All of ``some``, and a shorter context if that is not enough; or an empty string."""
    for _, changes in some:
        budget = replace(budget, **changes)
    words = [what for what, _ in some]
    if not tried(budget).fits:
        words.insert(0, _shorter_context(tried, budget))
    return f"use {' with '.join(words)}" if all(words) else ""


def _most_of_all(hardware: Hardware, budget: Budget, text: Callable[[int], str]) -> Iterator[Way]:
    if hardware.has_gpu:
        vram = text(usable_vram_bytes(hardware))
        yield f"--vram-gb {vram}", {"vram_bytes": gib_to_bytes(float(vram))}
    elif budget.vram_bytes:
        yield "no --vram-gb", {"vram_bytes": None}
    ram = text(hardware.ram_available_bytes)
    yield f"--ram-gb {ram}", {"ram_bytes": gib_to_bytes(float(ram))}
    if budget.gpu_experts is not None:
        yield "another placement", {"gpu_experts": None}


def _shorter_context(tried: LayOut, budget: Budget) -> str:
    """``--context N`` with the most whole pages that fit, or an empty string."""
    size = budget.page_size
    pages = (context_range(budget)[0] - 1) // size
    fewer = _least(
        pages - 1,
        lambda dropped: tried(replace(budget, context_tokens=(pages - dropped) * size)).fits,
    )
    return "" if fewer is None else f"--context {(pages - fewer) * size}"


def _smaller_batch(footprint: Footprint, hardware: Hardware, budget: Budget) -> str:
    """``--batch N`` with the most requests that fit, or an empty string."""
    asked, for_batch = budget.max_num_seqs, budget.for_batch
    if for_batch is None:
        return ""

    def fits(batch: int) -> bool:
        needs = replace(for_batch(batch), order=footprint.order)
        return lay_out(needs, hardware, replace(budget, max_num_seqs=batch)).fits

    fewer = _least(asked - 2, lambda dropped: fits(asked - 1 - dropped))
    return "" if fewer is None else f"--batch {asked - 1 - fewer}"


def _more_gib(option: str, most_bytes: int, fits: Callable[[int], bool]) -> str:
    """``option`` with the least GiB that fit, or an empty string."""
    least = _least(most_bytes, fits)
    if least is None:
        return ""
    return f"{option} {_short_gib(gib_at_least(least), least, fits)}"


def _emulated_gib(tried: LayOut, hardware: Hardware, budget: Budget) -> str:
    """``--vram-gb`` nearest to the asked one for a GPU side in RAM, or an empty string."""
    asked = budget.vram_bytes
    assert asked is not None

    def layout(size: int) -> Layout:
        return tried(replace(budget, vram_bytes=size))

    def has_room(size: int) -> bool:
        tried = layout(max(1, size))  # 0 would be no GPU side
        return not (tried.vram_missing or tried.expert_room_missing)

    def fits(size: int) -> bool:
        return size > 0 and layout(size).fits

    floor = _least(hardware.ram_available_bytes, has_room)
    if floor is None or not fits(floor):
        return ""
    if floor >= asked:
        return f"--vram-gb {_short_gib(gib_at_least(floor), floor, fits)}"
    dropped = _least(asked - floor, lambda dropped: fits(asked - dropped))
    assert dropped is not None
    most = asked - dropped
    return f"--vram-gb {_short_gib(gib_at_most(most), most, fits)}"


def _short_gib(text: str, size: int, fits: Callable[[int], bool]) -> str:
    """``text``, if so many GiB fit, or else exactly ``size`` bytes."""
    return text if fits(gib_to_bytes(float(text))) else _exact_gib(size)


def _exact_gib(size: int) -> str:
    """Read back and multiplied by GIB, which is a power of two, this is ``size``."""
    return repr(size / GIB)


def _least(high: int, is_enough: Callable[[int], bool]) -> int | None:
    """Bisect for the least number of 0..``high`` that is enough; None if ``high`` is not."""
    if high < 0 or not is_enough(high):
        return None
    low = 0
    while low < high:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle + 1
    return high

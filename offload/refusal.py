"""Sentences for plans that do not fit: the numbers, and the nearest plan that does.

Every suggested option is tried with the same arithmetic before it is printed.
"""

from collections.abc import Callable
from dataclasses import replace

from fiddler.errors import OutOfMemoryError
from offload.hardware import Hardware
from offload.layout import Layout, context_range, lay_out, usable_vram_bytes
from offload.plan import Budget, Footprint, GpuSide
from offload.units import gib_at_least, gib_at_most, gib_to_bytes, size_text


def refuse_vram_budget(hardware: Hardware, layout: Layout) -> OutOfMemoryError:
    """More VRAM was asked for than this process can have."""
    usable = usable_vram_bytes(hardware)
    return OutOfMemoryError(
        f"{size_text(layout.vram_limit)} of VRAM were asked for, but {size_text(usable)} of the "
        f"{size_text(hardware.vram_total_bytes)} of the {hardware.gpu_name} can be had",
        hint=f"use --vram-gb {gib_at_most(usable)} or less, or leave it out to use what is free",
    )


def refuse_ram_budget(hardware: Hardware, budget: Budget) -> OutOfMemoryError:
    """More RAM was asked for than the machine has."""
    assert budget.ram_bytes is not None
    return OutOfMemoryError(
        f"{size_text(budget.ram_bytes)} of RAM were asked for, but the machine has "
        f"{size_text(hardware.ram_total_bytes)}",
        hint=f"use --ram-gb {gib_at_most(hardware.ram_available_bytes)} or less, "
        "or leave it out to use what is free",
    )


def refuse_vram(
    footprint: Footprint, hardware: Hardware, budget: Budget, layout: Layout
) -> OutOfMemoryError:
    """The GPU side cannot hold even the parts that are not experts."""
    parts = [
        ("CUDA context", layout.context_bytes),
        ("safety margin", layout.margin_bytes),
        ("dense weights", footprint.dense_bytes),
        ("workspace", footprint.workspace_bytes),
        (f"{layout.context_tokens:,} tokens of context", layout.kv_bytes),
    ]
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts if size)
    return OutOfMemoryError(
        f"the GPU side needs {size_text(layout.vram_needed)} before any expert, but has "
        f"{size_text(layout.vram_limit)} ({listed})",
        hint=nearest_plan(footprint, hardware, budget),
    )


def refuse_placement(
    footprint: Footprint, hardware: Hardware, budget: Budget, layout: Layout
) -> OutOfMemoryError:
    """The GPU side has no room for all experts of a given placement."""
    needed = layout.gpu_expert_bytes + layout.spare_bytes
    return OutOfMemoryError(
        f"the placement's {layout.num_gpu_experts:,} experts take "
        f"{size_text(needed)} of VRAM, but {size_text(layout.expert_room)} of the "
        f"{size_text(layout.vram_limit)} are left for experts",
        hint=nearest_plan(footprint, hardware, budget),
    )


def refuse_ram(
    footprint: Footprint, hardware: Hardware, budget: Budget, layout: Layout
) -> OutOfMemoryError:
    """The host cannot hold what a step needs at a time."""
    what = (
        f"{layout.num_ram_experts:,} experts of {size_text(footprint.expert_bytes)}, one token's,"
    )
    what = f"{what} need"
    if layout.side is not GpuSide.CUDA:
        what = (
            f"the model with {layout.context_tokens:,} tokens of context and one token's experts "
            "needs"
        )
    usable = f"{size_text(layout.ram_limit)} may be used"
    if budget.ram_bytes is not None and budget.ram_bytes > layout.ram_limit:
        usable = (
            f"{size_text(layout.ram_limit)} of the {size_text(budget.ram_bytes)} asked for is free"
        )
    return OutOfMemoryError(
        f"{what} {size_text(layout.ram_needed)} of RAM, but {usable}",
        hint=nearest_plan(footprint, hardware, budget),
    )


def nearest_plan(footprint: Footprint, hardware: Hardware, budget: Budget) -> str:
    """Name each option that alone makes the plan fit, changed as little as possible."""

    def fits(**changes: int) -> bool:
        return lay_out(footprint, hardware, replace(budget, **changes)).fits

    most_vram = usable_vram_bytes(hardware)
    if not hardware.has_gpu and budget.vram_bytes:
        most_vram = hardware.ram_available_bytes
    ways = [
        _shorter_context(budget, lambda tokens: fits(context_tokens=tokens)),
        _more_gib("--vram-gb", most_vram, lambda size: fits(vram_bytes=size)),
        _more_gib("--ram-gb", hardware.ram_available_bytes, lambda size: fits(ram_bytes=size)),
        _another_placement(footprint, hardware, budget),
    ]
    found = [way for way in ways if way]
    if not found:
        return "no budget on this machine makes it fit: choose a smaller model or dtype"
    return f"use {' or '.join(found)}"


def _another_placement(footprint: Footprint, hardware: Hardware, budget: Budget) -> str:
    """Say so where a given placement is all that is wrong, or return an empty string."""
    if budget.gpu_experts is None:
        return ""
    unasked = replace(budget, gpu_experts=None)
    return "another placement" if lay_out(footprint, hardware, unasked).fits else ""


def _shorter_context(budget: Budget, fits: Callable[[int], bool]) -> str:
    """``--context N`` with the most whole pages that fit, or an empty string."""
    pages = (context_range(budget)[0] - 1) // budget.page_size
    fewer = _least(pages - 1, lambda dropped: fits((pages - dropped) * budget.page_size))
    return "" if fewer is None else f"--context {(pages - fewer) * budget.page_size}"


def _more_gib(option: str, most_bytes: int, fits: Callable[[int], bool]) -> str:
    """``option`` with the least short GiB figure that fits, or an empty string."""
    least = _least(most_bytes, fits)
    if least is None:
        return ""
    text = gib_at_least(least + 1)  # + 1: the text is read back as a float
    return f"{option} {text}" if fits(gib_to_bytes(float(text))) else ""


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

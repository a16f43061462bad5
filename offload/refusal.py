"""Sentences for plans that do not fit: the numbers, and the nearest plan that does."""

from fiddler.errors import OutOfMemoryError
from offload.hardware import Hardware
from offload.layout import Layout, usable_vram_bytes
from offload.plan import Budget, Footprint, GpuSide
from offload.units import counted, gib_at_most, size_text
from offload.ways_out import nearest_plan


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
        ("dense weights", footprint.dense_bytes - layout.ram_dense_bytes),
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
    usable = f"{size_text(layout.ram_limit)} may be used"
    if budget.ram_bytes is not None and budget.ram_bytes > layout.ram_limit:
        usable = (
            f"{size_text(layout.ram_limit)} of the {size_text(budget.ram_bytes)} asked for is free"
        )
    return OutOfMemoryError(
        f"{_in_ram(footprint, budget, layout)} {size_text(layout.ram_needed)} of RAM, but {usable}",
        hint=nearest_plan(footprint, hardware, budget),
    )


def _in_ram(footprint: Footprint, budget: Budget, layout: Layout) -> str:
    """What needs RAM, with the verb; a context only where it was asked for or is the least."""
    one_token = "one token's experts"
    if layout.side is GpuSide.CUDA:
        sizes = {"workspace": layout.ram_workspace_bytes, "input embedding": layout.ram_dense_bytes}
        parts = [f"{size_text(size)} of {name}" for name, size in sizes.items() if size]
        if layout.num_ram_experts:
            number = counted(layout.num_ram_experts, "expert")
            parts.insert(0, f"one token's {number} of {size_text(footprint.expert_bytes)}")
        *most, last = parts
        return f"{', '.join(most)} and {last} need" if most else f"{last} need"
    if layout.side is GpuSide.NONE:
        return f"the model with {layout.context_tokens:,} tokens of context and {one_token} needs"
    size = size_text(layout.vram_needed + layout.gpu_expert_bytes)
    asked = budget.context_tokens
    context = "" if asked is None else f" with {asked:,} tokens of context"
    return f"a GPU side of {size} in RAM{context} and {one_token} need"

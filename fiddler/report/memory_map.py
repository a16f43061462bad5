"""What lies where, as SVG: a bar for each memory, its parts named below it."""

from collections.abc import Sequence
from dataclasses import dataclass

from fiddler.report.svg import FONT, WIDTH, element, picture, text, text_width, titled
from offload.hardware import Hardware
from offload.plan import GpuSide, Plan
from offload.units import size_text

BAR_HEIGHT, LINE, SWATCH, GAP = 26, 20, 11, 22  # pixels
LEAST_SHOWN = 1.0  # a part that is there at all is at least this wide
EDGE = 1.5  # between two parts


@dataclass(frozen=True, slots=True)
class Part:
    """``kind`` decides the colour."""

    name: str
    kind: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """One kind of memory and what fills it; parts of no bytes are left out.

    ``limit_bytes`` may be filled, 0: as many as are. What is left of them is said, not drawn: it
    would leave no room for the rest.
    """

    name: str
    parts: tuple[Part, ...]
    limit_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """All parts."""
        return sum(part.num_bytes for part in self.parts)


def memory_map(plan: Plan, hardware: Hardware) -> list[Memory]:
    """VRAM, RAM and disk; without CUDA the GPU side is a part of RAM."""
    size = plan.memory
    gpu_side = (
        Part("CUDA context", "context", size.context),
        Part("safety margin", "margin", size.margin),
        Part("dense weights", "dense", size.dense),
        Part("KV cache", "kv", size.kv),
        Part("workspace", "workspace", size.workspace),
        Part("staging", "staging", size.staging),
        Part("experts on the GPU side", "experts", size.gpu_experts),
        Part("unused of the budget", "unused", size.unused),
    )
    cold = Part("experts on the CPU side", "experts", size.cpu_experts)
    on_disk = Memory("Disk", (Part("experts", "experts", size.disk_experts),))
    limit = plan.ram_budget_bytes
    if plan.gpu_side is GpuSide.CUDA:
        on_gpu = Memory(f"VRAM of {hardware.gpu_name}", gpu_side)
        dense = Part("input embedding", "dense", size.cpu_dense)
        workspace = Part("workspace", "workspace", size.cpu_workspace)
        return [on_gpu, Memory("RAM", (dense, workspace, cold), limit), on_disk]
    return [Memory("RAM", (*gpu_side[:-1], cold), limit), on_disk]


def memory_svg(memories: Sequence[Memory], title: str) -> str:
    """Bars of one scale, so that lengths can be compared."""
    shown = [memory for memory in memories if memory.num_bytes]
    scale = (WIDTH - 1) / max((memory.num_bytes for memory in shown), default=1)
    parts: list[str] = []
    top = 0.0
    for memory in shown:
        parts.append(text(0, top + FONT + 2, _headline(memory), font_weight="bold"))
        parts += _bar(memory, top + LINE, scale)
        named, bottom = _names(memory, top + LINE + BAR_HEIGHT + 8)
        parts += named
        top = bottom + 14
    description = "; ".join(
        f"{memory.name}: " + ", ".join(f"{p.name} {size_text(p.num_bytes)}" for p in _there(memory))
        for memory in shown
    )
    return picture(max(top, 1.0), title, description, parts)


def _headline(memory: Memory) -> str:
    of = f" of {size_text(memory.limit_bytes)}" if memory.limit_bytes else ""
    return f"{memory.name}, {size_text(memory.num_bytes)}{of}"


def _there(memory: Memory) -> list[Part]:
    return [part for part in memory.parts if part.num_bytes]


def _bar(memory: Memory, top: float, scale: float) -> list[str]:
    bars, left = [], 0.0
    for part in _there(memory):
        width = part.num_bytes * scale
        bar = element(
            "rect",
            x=left,
            y=top,
            width=max(LEAST_SHOWN, width - EDGE),
            height=float(BAR_HEIGHT),
            class_=f"part-{part.kind}",
        )
        bars.append(titled(bar, f"{part.name}: {size_text(part.num_bytes)}"))
        left += width
    return bars


def _names(memory: Memory, top: float) -> tuple[list[str], float]:
    """A swatch and a name for each part, in lines; and where the last line ends."""
    names: list[str] = []
    left, line = 0.0, top
    for part in _there(memory):
        label = f"{part.name} {size_text(part.num_bytes)}"
        width = SWATCH + 5 + text_width(label)
        if left and left + width > WIDTH:
            left, line = 0.0, line + LINE
        names.append(
            element(
                "rect",
                x=left,
                y=line,
                width=SWATCH,
                height=SWATCH,
                class_=f"part-{part.kind}",
            )
        )
        names.append(text(left + SWATCH + 5, line + SWATCH - 1, label))
        left += width + GAP
    return names, line + LINE

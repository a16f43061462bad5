"""What lives where, a bar for each memory: letters, on colours where there are some."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fiddler.report.memory_map import Memory, Part
from fiddler.report.page import PART_COLOURS
from offload.units import size_text

if TYPE_CHECKING:
    from rich.text import Text

BAR, LEAST_BAR = 52, 12  # characters
NAME = 26
# of a kind: its letter and what the legend calls it
KINDS = {
    "context": ("c", "context"),
    "margin": ("m", "margin"),
    "dense": ("d", "dense"),
    "kv": ("k", "KV"),
    "workspace": ("w", "workspace"),
    "staging": ("s", "staging"),
    "experts": ("E", "experts"),
    "unused": (".", "unused"),
}


def bar_lines(memories: Sequence[Memory], width: int) -> "list[Text]":
    """A line for each memory that holds something, and one that explains them.

    A bar is as long as its memory may be filled, and fits into ``width`` with its name; blanks are
    what is left.
    """
    bar = max(LEAST_BAR, min(BAR, width - NAME - 1))
    shown = [memory for memory in memories if memory.num_bytes]
    kinds = dict.fromkeys(part.kind for memory in shown for part in _there(memory))
    return [*(_line(memory, bar) for memory in shown), _legend(list(kinds))]


def widths(parts: Sequence[Part], columns: int) -> list[int]:
    """Characters of each part, which sum to ``columns``, or to one for each part if that is more.

    In proportion, but at least one; those that lose most by rounding down get what is left.
    """
    total = sum(part.num_bytes for part in parts)
    rest = max(0, columns - len(parts))
    exact = [part.num_bytes * rest / total for part in parts]
    found = [int(width) for width in exact]
    by_loss = sorted(range(len(parts)), key=lambda n: found[n] - exact[n])
    for n in by_loss[: rest - sum(found)]:
        found[n] += 1
    return [width + 1 for width in found]


def _there(memory: Memory) -> list[Part]:
    return [part for part in memory.parts if part.num_bytes]


def _line(memory: Memory, bar: int) -> "Text":
    from rich.text import Text

    parts = _there(memory)
    columns = round(bar * memory.num_bytes / max(memory.limit_bytes, memory.num_bytes))
    cells = widths(parts, columns)
    of = f" of {size_text(memory.limit_bytes)}" if memory.limit_bytes else ""
    line = Text(f"{memory.name.split()[0]} {size_text(memory.num_bytes)}{of}".ljust(NAME))
    for part, width in zip(parts, cells, strict=True):
        line.append_text(_cells(part.kind, width))
    return line.append(f"{' ' * (bar - sum(cells))}|")


def _legend(kinds: Sequence[str]) -> "Text":
    from rich.text import Text

    return Text("  ").join(_cells(kind, 1).append(f" {KINDS[kind][1]}") for kind in kinds)


def _cells(kind: str, width: int) -> "Text":
    from rich.text import Text

    return Text.assemble((KINDS[kind][0] * width, f"black on #{PART_COLOURS[kind]}"))

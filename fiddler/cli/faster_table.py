"""The table of settings that would be faster."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fiddler.faster import Faster


def faster_table(ways: "Sequence[Faster]") -> "Table":
    """A row for each of ``ways``: what it changes, and what it costs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, justify in (
        *(("To go faster", "left"), ("decode tok/s", "right"), ("prompt tok/s", "right")),
        ("cost", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for way in ways:
        table.add_row(way.option, *(change(pair) for pair in (way.decode, way.prefill)), way.cost)
    return table


def change(rates: tuple[float, float]) -> str:
    """Tokens a second, before and after."""
    return " -> ".join(map(rate, rates))


def rate(tokens_per_s: float) -> str:
    """Tokens a second with three digits, or all before the point."""
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"

"""The rows that benchmarks print and write: one measured value beside its limit and its target."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``ratio`` is value / limit, or the median of paired ratios; ``target`` belongs to it."""

    name: str
    value: float
    unit: str
    limit: float
    ratio: float
    target: float
    met: bool

    def renamed(self, name: str) -> Self:
        return replace(self, name=name)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def row_from(fields: dict[str, Any]) -> Row:
    """The inverse of ``as_dict``."""
    return Row(**fields)


def at_least(name: str, value: float, unit: str, limit: float, ratio: float, target: float) -> Row:
    """A row whose ratio should be large, as of a bandwidth."""
    return Row(
        name=name,
        value=value,
        unit=unit,
        limit=limit,
        ratio=ratio,
        target=target,
        met=ratio >= target,
    )


def at_most(name: str, value: float, unit: str, limit: float, ratio: float, target: float) -> Row:
    """A row whose ratio should be small, as of a time."""
    return Row(
        name=name,
        value=value,
        unit=unit,
        limit=limit,
        ratio=ratio,
        target=target,
        met=ratio <= target,
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}} {'value':>9} unit       limit  ratio target met"]
    for row in rows:
        numbers = f"{row.limit:9.1f} {row.ratio:6.2f} {row.target:6.2f}"
        met = "yes" if row.met else "no"
        lines.append(f"{row.name:{width}} {row.value:9.1f} {row.unit:5} {numbers} {met}")
    return "\n".join(lines)


def write(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([row.as_dict() for row in rows], indent=1) + "\n")

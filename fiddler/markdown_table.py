"""A Markdown table that can be read as it is: columns as wide as their longest cell."""

import sys
from collections.abc import Collection, Sequence


def markdown_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str],
    width: int = sys.maxsize,
) -> list[str]:
    """Lines of the table; columns whose heading is in ``left`` are aligned left, others right.

    One that is wider than ``width`` would be folded into nothing readable: each row is then a
    record, a line for each cell that is not empty, with a blank line between records.
    """
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    is_left = [heading in left for heading in headings]
    if sum(widths) + 3 * len(widths) + 1 > width:
        return _records(headings, rows)
    rule = [
        "-" * width if at_left else "-" * (width - 1) + ":"
        for width, at_left in zip(widths, is_left, strict=True)
    ]
    return [_line(line, widths, is_left) for line in (headings, rule, *rows)]


def _records(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    width = max(map(len, headings))
    lines: list[str] = []
    for row in rows:
        cells = zip(headings, row, strict=True)
        lines += ["", *(f"{heading:<{width}}  {cell}" for heading, cell in cells if cell)]
    return lines[1:]


def _line(cells: Sequence[str], widths: list[int], is_left: list[bool]) -> str:
    padded = [
        cell.ljust(width) if at_left else cell.rjust(width)
        for cell, width, at_left in zip(cells, widths, is_left, strict=True)
    ]
    return f"| {' | '.join(padded)} |"

"""A Markdown table that can be read as it is: columns as wide as their longest cell."""

import sys
from collections.abc import Collection, Sequence

from fiddler.wrapping import wrapped


def markdown_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str],
    width: int = sys.maxsize,
) -> list[str]:
    """Lines of the table; columns whose heading is in ``left`` are aligned left, others right.

    One that is wider than ``width`` would be folded into nothing readable: what all its rows share
    then stands above it, and if that is not enough each row is a record, a line for each cell that
    is not empty or as many as it needs, with a blank line between records.
    """
    lines = _table(headings, rows, left)
    if len(lines[0]) <= width:
        return lines
    differ = [i for i in range(len(headings)) if len({row[i] for row in rows}) > 1]
    same = [i for i in range(len(headings)) if i not in differ]
    lines = _table(_chosen(headings, differ), [_chosen(row, differ) for row in rows], left)
    if not differ or len(lines[0]) > width:
        return _records(headings, rows, width)
    shared = _records(_chosen(headings, same), [_chosen(rows[0], same)], width)
    return [*shared, "", *lines] if shared else lines


def _chosen(cells: Sequence[str], columns: Sequence[int]) -> list[str]:
    return [cells[i] for i in columns]


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]
) -> list[str]:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    is_left = [heading in left for heading in headings]
    rule = [
        "-" * width if at_left else "-" * (width - 1) + ":"
        for width, at_left in zip(widths, is_left, strict=True)
    ]
    return [_line(line, widths, is_left) for line in (headings, rule, *rows)]


def _records(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    names = max(map(len, headings))
    lines: list[str] = []
    for row in rows:
        cells = zip(headings, row, strict=True)
        lines.append("")
        for heading, cell in cells:
            lines += wrapped(f"{heading:<{names}}  ", cell, width)
    return lines[1:]


def _line(cells: Sequence[str], widths: list[int], is_left: list[bool]) -> str:
    padded = [
        cell.ljust(width) if at_left else cell.rjust(width)
        for cell, width, at_left in zip(cells, widths, is_left, strict=True)
    ]
    return f"| {' | '.join(padded)} |"

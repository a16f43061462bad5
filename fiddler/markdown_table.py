"""A Markdown table that can be read as it is: columns as wide as their longest cell."""

from collections.abc import Collection, Sequence


def markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str]
) -> list[str]:
    """Lines of the table; columns whose heading is in ``left`` are aligned left, others right."""
    lines = [headings, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    is_left = [heading in left for heading in headings]
    rule = [
        "-" * width if at_left else "-" * (width - 1) + ":"
        for width, at_left in zip(widths, is_left, strict=True)
    ]
    return [_line(line, widths, is_left) for line in (headings, rule, *rows)]


def _line(cells: Sequence[str], widths: list[int], is_left: list[bool]) -> str:
    padded = [
        cell.ljust(width) if at_left else cell.rjust(width)
        for cell, width, at_left in zip(cells, widths, is_left, strict=True)
    ]
    return f"| {' | '.join(padded)} |"

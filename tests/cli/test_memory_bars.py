"""Bars of memory in a terminal: every part is seen, and lengths are in proportion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.memory_bars import BAR, KINDS, bar_lines, widths
from fiddler.report.memory_map import Memory, Part
from fiddler.report.page import PART_COLOURS

GIB = 1 << 30


def parts(*sizes: int) -> tuple[Part, ...]:
    kinds = list(KINDS)
    return tuple(Part(f"part {n}", kinds[n], size) for n, size in enumerate(sizes))


@given(st.lists(st.integers(1, 100 * GIB), min_size=1, max_size=8), st.integers(0, 60))
def test_parts_fill_their_bar_and_are_all_seen(sizes: list[int], columns: int) -> None:
    found = widths(parts(*sizes), columns)
    assert sum(found) == max(columns, len(sizes)) and min(found) >= 1
    rest = max(0, columns - len(sizes))
    for width, size in zip(found, sizes, strict=True):
        assert abs(width - 1 - size * rest / sum(sizes)) < 1


def test_every_kind_has_a_letter_of_its_own_and_a_colour() -> None:
    assert set(KINDS) == set(PART_COLOURS)
    assert len({letter for letter, _ in KINDS.values()}) == len(KINDS)


def test_a_bar_says_how_full_its_memory_is() -> None:
    half = Memory("RAM", parts(0, 0, 0, 0, 0, 0, 4 * GIB), 8 * GIB)
    full = Memory("VRAM of a card", parts(GIB, 0, 2 * GIB))
    memories = [half, full, Memory("Disk", ())]
    first, second, legend = map(str, bar_lines(memories, 80))
    assert first.startswith("RAM 4.0 GiB of 8.0 GiB ") and first.count("E") == BAR // 2
    assert second.startswith("VRAM 3.0 GiB ") and second.count("c") + second.count("d") == BAR
    assert first.endswith("|") and len(first) == len(second) <= 80
    assert legend == "E experts  c context  d dense"


@given(st.integers(40, 200))
def test_a_bar_fits_into_its_terminal(width: int) -> None:
    memory = Memory("RAM", parts(GIB, 3 * GIB), 8 * GIB)
    line = str(bar_lines([memory], width)[0])
    assert len(line) <= width and line.endswith("|")
    assert line.count("c") + line.count("m") == pytest.approx((len(line) - 27) / 2, abs=1)

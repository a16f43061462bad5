"""Bars of memory in a terminal: every part is seen, and lengths are in proportion."""

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
    first, second, legend = map(str, bar_lines([half, full, Memory("Disk", ())]))
    assert first.startswith("RAM 4.0 GiB of 8.0 GiB ") and first.count("E") == BAR // 2
    assert second.startswith("VRAM 3.0 GiB ") and second.count("c") + second.count("d") == BAR
    assert first.endswith("|") and len(first) == len(second) <= 80
    assert legend == "E experts  c context  d dense"

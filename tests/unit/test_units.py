"""Sizes as people read them, and figures for a command line that are never too small."""

from hypothesis import given
from hypothesis import strategies as st

from offload.units import counted, gib_at_least, gib_at_most, gib_to_bytes, size_text


@given(st.integers(1, 1 << 42))
def test_a_suggested_figure_is_enough_and_not_much_more(size_bytes: int) -> None:
    suggested = gib_to_bytes(float(gib_at_least(size_bytes)))
    assert size_bytes - 1 <= suggested <= size_bytes * 1.1 + (1 << 21)
    assert gib_to_bytes(float(gib_at_most(size_bytes))) <= size_bytes


def test_sizes_have_three_digits_at_most() -> None:
    assert size_text(9) == "9 B"
    assert size_text(12 << 10) == "12.0 KiB"
    assert size_text(704 << 20) == "704 MiB"
    assert size_text(24 << 30) == "24.0 GiB"


def test_one_thing_is_no_things() -> None:
    assert [counted(n, "core") for n in (0, 1, 2, 1500)] == [
        *("0 cores", "1 core", "2 cores", "1,500 cores")
    ]

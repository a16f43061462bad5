"""Sharing cold experts: the table is the best there is, and sane at its edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.cold_share import GIGA, ShareCosts, kept_rows

QWEN = (768, 3 * 2048 * 768 * 2)  # width and bytes of an expert
MIXTRAL = (14336, 3 * 4096 * 14336 * 2)
PACKED = (768, 2_433_024)


def slower_s(
    costs: ShareCosts, total: int, width: int, expert_bytes: int, kept: int, *, is_packed: bool
) -> float:
    """Of the two sides' times for ``total`` rows, of which the workers keep some."""
    sides = [0.0]
    for rows, speed, start_s in (
        (kept, costs.cpu_rate(is_packed=is_packed), costs.cpu_start_s),
        (total - kept, costs.link_bytes_per_s, costs.link_start_s),
    ):
        if rows:
            sides.append(start_s + expert_bytes * rows / width / speed)
    return max(sides)


@given(
    st.floats(1, 500),
    st.floats(1, 500),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    st.sampled_from([QWEN, MIXTRAL, PACKED, (100, 1000), (16, 1000)]),
    st.sampled_from([1, 32, 128]),
    st.sampled_from([16, 64]),
)
def test_no_other_share_is_better(
    cpu: float,
    link: float,
    cpu_start: float,
    link_start: float,
    sizes: tuple[int, int],
    group: int,
    unit: int,
) -> None:
    costs = ShareCosts(
        cpu_bytes_per_s=cpu * GIGA,
        link_bytes_per_s=link * GIGA,
        cpu_start_s=cpu_start,
        link_start_s=link_start,
        unit=unit,
    )
    width, _ = sizes
    kept_N = kept_rows(12, *sizes, costs, group)
    assert kept_N.dtype == np.int32 and kept_N.shape == (13,) and kept_N[0] == 0
    parts = [*range(0, width, max(unit, group)), width]
    for n in range(1, 13):
        kept, total = int(kept_N[n]), n * width
        others = [whole * width + part for whole in range(n) for part in parts]
        assert kept in others
        least = min(slower_s(costs, total, *sizes, other, is_packed=group > 1) for other in others)
        assert slower_s(costs, total, *sizes, kept, is_packed=group > 1) == pytest.approx(
            least, rel=1e-9
        )


def shares(sizes: tuple[int, int], *counts: int, group: int = 1) -> list[float]:
    """The part of all rows that the device takes, by the preset."""
    kept_N = kept_rows(max(counts), *sizes, ShareCosts(), group)
    return [1 - int(kept_N[n]) / (n * sizes[0]) for n in counts]


@pytest.mark.parametrize("sizes", [QWEN, MIXTRAL])
def test_the_preset_gives_the_link_a_quarter_and_more(sizes: tuple[int, int]) -> None:
    assert all(0.23 < share < 0.34 for share in shares(sizes, 2, 3, 4, 5, 8, 64))


def test_shares_are_whole_groups_and_worth_a_start() -> None:
    kept_N = kept_rows(8, *PACKED, ShareCosts(), 128)
    assert (kept_N % PACKED[0] % 128 == 0).all() and 0.25 < shares(PACKED, 8, group=128)[0] < 0.38
    assert shares((640, 100_000), 1, 2, 3) == [0, 0, 0]

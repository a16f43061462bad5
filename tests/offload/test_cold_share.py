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
    costs: ShareCosts, num_experts: int, width: int, expert_bytes: int, kept: int
) -> float:
    sides = [0.0]
    for rows, speed, start_s in (
        (kept, costs.cpu_bytes_per_s, costs.cpu_start_s),
        (width - kept, costs.link_bytes_per_s, costs.link_start_s),
    ):
        if rows and num_experts:
            sides.append(start_s + num_experts * expert_bytes * rows / width / speed)
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
    assert kept_N.dtype == np.int32 and kept_N.shape == (13,) and kept_N[0] == width
    for n, kept in enumerate(kept_N.tolist()):
        others = [*range(0, width, max(unit, group)), width]
        assert kept in others
        found = slower_s(costs, n, *sizes, kept)
        assert found == pytest.approx(min(slower_s(costs, n, *sizes, m) for m in others), rel=1e-12)


def shares(sizes: tuple[int, int], *counts: int, group: int = 1) -> list[int]:
    """Rows that the device takes, by the preset."""
    kept_N = kept_rows(max(counts), *sizes, ShareCosts(), group)
    return [sizes[0] - int(kept_N[n]) for n in counts]


def test_the_preset_gives_the_link_a_quarter_and_more() -> None:
    assert shares(QWEN, 0, 1, 2, 5, 8, 128) == [0, 192, 192, 192, 192, 192]
    assert shares(MIXTRAL, 0, 1, 2, 4, 64) == [0, 4160, 4160, 4160, 4160]


def test_shares_are_whole_groups_and_worth_a_start() -> None:
    assert shares(PACKED, 0, 1, 2, 8, group=128) == [0, 128, 128, 128]
    assert shares((640, 100_000), 1, 2, 7) == [0, 0, 0]

"""Sharing cold experts: the table is the best there is, and sane at its edges."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.cold_share import GIGA, ShareCosts, pull_counts

QWEN_BYTES, MIXTRAL_BYTES = 3 * 2048 * 768 * 2, 3 * 4096 * 14336 * 2


def slower_s(costs: ShareCosts, expert_bytes: int, on_cpu: int, pulled: int) -> float:
    sides = []
    for count, speed, start_s in (
        (on_cpu, costs.cpu_bytes_per_s, costs.cpu_start_s),
        (pulled, costs.link_bytes_per_s, costs.link_start_s),
    ):
        sides.append(start_s + count * expert_bytes / speed if count else 0.0)
    return max(sides)


@given(
    st.floats(1, 500),
    st.floats(1, 500),
    st.floats(0, 1e-3),
    st.floats(0, 1e-3),
    st.sampled_from([QWEN_BYTES, MIXTRAL_BYTES, 1000]),
)
def test_no_other_share_is_better(
    cpu: float, link: float, cpu_start: float, link_start: float, expert_bytes: int
) -> None:
    costs = ShareCosts(
        cpu_bytes_per_s=cpu * GIGA,
        link_bytes_per_s=link * GIGA,
        cpu_start_s=cpu_start,
        link_start_s=link_start,
    )
    counts_N = pull_counts(12, expert_bytes, costs)
    assert counts_N.dtype == np.int32 and counts_N.shape == (13,) and counts_N[0] == 0
    for n, count in enumerate(counts_N.tolist()):
        assert 0 <= count <= n
        found = slower_s(costs, expert_bytes, n - count, count)
        others = [slower_s(costs, expert_bytes, n - m, m) for m in range(n + 1)]
        assert found == pytest.approx(min(others), rel=1e-12)


def test_the_preset_gives_the_link_a_third() -> None:
    assert pull_counts(8, QWEN_BYTES, ShareCosts()).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert pull_counts(300, QWEN_BYTES, ShareCosts())[300] == 100


def test_two_wide_experts_are_too_few_to_share() -> None:
    assert pull_counts(4, MIXTRAL_BYTES, ShareCosts()).tolist() == [0, 0, 0, 1, 1]

"""Where workers and link meet: the search, with made-up machines; a GPU's own in test_measuring."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.cold_share import kept_rows
from offload.share_rates import COARSE, FINE, best_part, costs_of


def layer_s(part: float, cpu: float, link: float) -> float:
    """Of 1 GB, by rates in GB/s of either side."""
    return max(part / cpu, (1 - part) / link)


@given(st.floats(20, 200), st.floats(5, 100))
def test_both_sides_end_at_once(cpu: float, link: float) -> None:
    part, seconds = best_part(lambda part: layer_s(part, cpu, link))
    ideal = min(max(cpu / (cpu + link), COARSE[0]), 1.0)
    assert seconds == layer_s(part, cpu, link)
    assert abs(part - ideal) <= FINE + 0.01


@given(st.integers(0, 1000))
def test_slow_moments_do_not_matter(seed: int) -> None:
    rng = random.Random(seed)

    def seconds(part: float) -> float:
        return layer_s(part, 108, 40) * rng.choice([1, 1, 1, 1, 3])

    part, _ = best_part(seconds)
    assert part == pytest.approx(108 / 148, abs=0.16)


def test_of_parts_that_take_as_long_the_workers_get_the_largest() -> None:
    assert best_part(lambda part: 1.0) == (1.0, 1.0)
    assert best_part(lambda part: 1.0 if part <= 0.7 else 2.0)[0] == pytest.approx(0.7)


@pytest.mark.parametrize("part", [0.3, 0.72, 1.0])
def test_the_rows_are_divided_so(part: float) -> None:
    kept_N = kept_rows(4, 1024, 12_582_912, costs_of(part))
    assert kept_N[4] / 4096 == pytest.approx(part, abs=64 / 4096)

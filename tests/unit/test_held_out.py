"""How sure a held-out hit rate is: the interval holds what it says, whatever windows are like."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.held_out import rate_interval, student


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (9, 2.262), (30, 2.042), (1000, 1.962)],
)
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, rel=0.01)


@pytest.mark.parametrize("num_windows", [4, 10, 40])
def test_it_holds_the_truth_in_95_of_100_texts(num_windows: int) -> None:
    """Windows have hit rates of their own around 0.6, and lengths of their own."""
    rng = np.random.default_rng(num_windows)
    held = 0
    for _ in range(2000):
        rates_W = rng.beta(12, 8, num_windows)
        totals_W = rng.integers(500, 1500, num_windows)
        low, high = rate_interval(rng.binomial(totals_W, rates_W), totals_W)
        held += low <= 0.6 <= high
    assert 0.92 < held / 2000 < 0.975


def test_windows_weigh_by_their_routes_as_the_bootstrap_says() -> None:
    rng = np.random.default_rng(0)
    totals_W = rng.integers(100, 2000, 60)
    hits_W = rng.binomial(totals_W, rng.beta(6, 4, 60))
    low, high = rate_interval(hits_W, totals_W)
    drawn = rng.integers(0, 60, (4000, 60))
    rates = hits_W[drawn].sum(axis=1) / totals_W[drawn].sum(axis=1)
    assert [low, high] == pytest.approx(np.quantile(rates, [0.025, 0.975]).tolist(), abs=0.01)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=8))
def test_it_always_holds_the_rate_and_stays_within_0_and_1(pairs: list[tuple[int, int]]) -> None:
    hits = [min(pair) for pair in pairs]
    totals = [max(pair) for pair in pairs]
    low, high = rate_interval(hits, totals)
    assert 0.0 <= low <= high <= 1.0
    if sum(totals):
        assert low - 1e-12 <= sum(hits) / sum(totals) <= high + 1e-12


def test_one_window_says_nothing() -> None:
    assert rate_interval([3], [4]) == (0.0, 1.0)
    assert rate_interval([3, 0], [4, 0]) == (0.0, 1.0)
    assert rate_interval([], []) == (0.0, 1.0)

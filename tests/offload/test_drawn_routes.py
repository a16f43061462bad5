"""Drawn experts: distinct, by the law, and the same however they are asked for.

Statistics are of fixed seeds, so they hold at every run; bounds are five standard deviations.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.drawn_routes import DrawnRoutes, Ids
from offload.routing_law import Law

LAWS = [Law(), Law(skew=1.2), Law(skew=300.0), Law(stay=0.8), Law(stay=1.0), Law(skew=1.2, drift=2)]


def routes(law: Law, **changes: Any) -> DrawnRoutes:
    options = {"seed": 0, "num_layers": 3, "num_experts": 8, "top_k": 2} | changes
    return DrawnRoutes(law, **options)


def independent(law: Law, count: int, position: int = 0, **changes: Any) -> Ids:
    """What ``count`` requests choose at one position, ``[count, L, K]``."""
    drawn = routes(law, **changes)
    return np.concatenate([drawn.ids(request, position, position + 1) for request in range(count)])


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """In units of standard deviations from its mean."""
    freedom = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@given(
    law=st.sampled_from(LAWS),
    seed=st.integers(-(2**70), 2**70),
    num_experts=st.integers(1, 12),
    data=st.data(),
)
def test_choices_are_distinct_experts(
    law: Law, seed: int, num_experts: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    drawn_PLK = routes(law, seed=seed, num_experts=num_experts, top_k=top_k).ids(0, 0, 6)
    assert drawn_PLK.shape == (6, 3, top_k)
    assert drawn_PLK.min() >= 0
    assert drawn_PLK.max() < num_experts
    assert (np.diff(np.sort(drawn_PLK, axis=2), axis=2) > 0).all()


@given(
    law=st.sampled_from(LAWS),
    asked=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6
    ),
)
def test_a_choice_depends_on_its_request_and_position_alone(
    law: Law, asked: list[tuple[int, int, int]]
) -> None:
    shared = routes(law)
    for request, start, length in asked:
        alone = routes(law).ids(request, 0, 20)[start : start + length]
        np.testing.assert_array_equal(shared.ids(request, start, start + length), alone)


@pytest.mark.parametrize("law", [Law(), Law(skew=1.0), Law(stay=0.5)])
def test_seeds_requests_layers_and_positions_differ(law: Law) -> None:
    size = {"num_experts": 64, "top_k": 8}
    first_PLK = routes(law, **size).ids(0, 0, 2)
    assert (routes(law, seed=1, **size).ids(0, 0, 2) != first_PLK).any()
    assert (routes(law, **size).ids(1, 0, 2) != first_PLK).any()
    assert (first_PLK[0] != first_PLK[1]).any()
    assert (first_PLK[:, 0] != first_PLK[:, 1]).any()


@pytest.mark.parametrize(("law", "position"), [(Law(), 0), (Law(), 3), (Law(stay=0.7), 3)])
def test_uniform_and_sticky_use_all_experts_alike(law: Law, position: int) -> None:
    num_experts, top_k, count = 8, 3, 2000
    drawn_RLK = independent(law, count, position, top_k=top_k)
    for layer in range(3):
        observed_E = np.bincount(drawn_RLK[:, layer].ravel(), minlength=num_experts)
        expected_E = np.full(num_experts, count * top_k / num_experts)
        # choices of one request exclude each other, which narrows the counts by this factor
        narrowed = (num_experts - top_k) / (num_experts - 1)
        observed_E = expected_E + (observed_E - expected_E) / math.sqrt(narrowed)
        assert abs(chi_square(observed_E, expected_E)) < 5


@pytest.mark.parametrize("skew", [0.5, 1.2])
def test_zipf_follows_its_law(skew: float) -> None:
    count = 4000
    drawn_RLK = independent(Law(skew=skew), count, num_experts=6, top_k=1)
    weight_E = np.arange(1, 7) ** -skew
    for layer in range(3):
        observed_E = np.sort(np.bincount(drawn_RLK[:, layer].ravel(), minlength=6))[::-1]
        assert abs(chi_square(observed_E, count * weight_E / weight_E.sum())) < 5


def test_zipf_draws_one_after_the_other_without_putting_back() -> None:
    count, weights = 4000, np.arange(1, 6) ** -1.5
    expected_E = np.zeros(5)
    for first, second in itertools.permutations(range(5), 2):
        chance = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        expected_E[[first, second]] += chance
    drawn_RLK = independent(Law(skew=1.5), count, num_experts=5, top_k=2)
    for layer in range(3):
        share_E = np.sort(np.bincount(drawn_RLK[:, layer].ravel(), minlength=5) / count)[::-1]
        assert np.abs(share_E - expected_E).max() < 5 * math.sqrt(0.25 / count)


def test_zipf_prefers_other_experts_in_other_layers() -> None:
    drawn_RLK = independent(Law(skew=3.0), 50, num_layers=12, num_experts=64, top_k=1)
    favourites = {int(np.bincount(drawn_RLK[:, layer, 0]).argmax()) for layer in range(12)}
    assert len(favourites) > 6


@pytest.mark.parametrize("stay", [0.0, 0.3, 0.9, 1.0])
def test_an_expert_stays_with_the_given_probability(stay: float) -> None:
    num_experts, top_k, count = 8, 3, 700
    drawn_PLK = routes(Law(stay=stay), top_k=top_k, num_layers=2).ids(0, 0, count)
    kept = np.array(
        [
            len(set(before) & set(after))
            for layer in range(2)
            for before, after in itertools.pairwise(drawn_PLK[:, layer].tolist())
        ]
    )
    expected = 0.0
    for redrawn in range(top_k + 1):  # which may happen to bring an old expert back
        chance = math.comb(top_k, redrawn) * (1 - stay) ** redrawn * stay ** (top_k - redrawn)
        back = redrawn**2 / (num_experts - top_k + redrawn)
        expected += chance * (top_k - redrawn + back)
    assert abs(kept.mean() - expected) <= 5 * kept.std() / math.sqrt(len(kept)) + 1e-9


def test_what_does_not_stay_is_drawn_as_if_nothing_could() -> None:
    np.testing.assert_array_equal(routes(Law(stay=0.0)).ids(0, 0, 9), routes(Law()).ids(0, 0, 9))


def test_drift_changes_the_favourites_and_nothing_before_the_first_change() -> None:
    """With so steep a law a token chooses the favourites alone, the same ones until they change."""
    size = {"num_experts": 64, "top_k": 3, "num_layers": 6}
    drifting_PLK = np.sort(routes(Law(skew=300.0, drift=5), **size).ids(0, 0, 15), axis=2)
    still_PLK = np.sort(routes(Law(skew=300.0), **size).ids(0, 0, 15), axis=2)
    np.testing.assert_array_equal(drifting_PLK[:5], still_PLK[:5])
    for era in range(3):
        assert (drifting_PLK[5 * era : 5 * era + 5] == drifting_PLK[5 * era]).all()
    assert (drifting_PLK[::5] != drifting_PLK[[5, 10, 0]]).any(axis=(1, 2)).all()
    again_PLK = np.sort(routes(Law(skew=300.0, drift=5), **size).ids(1, 0, 15), axis=2)
    np.testing.assert_array_equal(again_PLK, drifting_PLK)  # one subject for all requests

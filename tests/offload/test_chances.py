"""How many experts tokens choose, against drawing them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.chances import (
    LayerChances,
    blind_chances,
    distinct,
    law_chances,
    placed_chances,
    token_counts,
)
from offload.drawn_routes import DrawnRoutes
from offload.placement import Placement
from offload.routing_law import Law


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.5])
@pytest.mark.parametrize(("num_experts", "top_k", "rows"), [(8, 2, 4), (64, 8, 1), (64, 8, 16)])
def test_distinct_experts_are_as_many_as_are_drawn(
    skew: float, num_experts: int, top_k: int, rows: int
) -> None:
    law = Law(skew=skew)
    routes = DrawnRoutes(law, seed=1, num_layers=2, num_experts=num_experts, top_k=top_k)
    steps = [routes.ids(0, n * rows, (n + 1) * rows) for n in range(150)]
    drawn = np.mean([len(np.unique(ids[:, layer])) for ids in steps for layer in (0, 1)])
    chance_E = law_chances(law, num_experts, top_k)
    assert chance_E.sum() == pytest.approx(top_k)
    assert distinct(chance_E.tolist(), rows) == pytest.approx(drawn, rel=0.06)


@pytest.mark.parametrize("num_hot", [0, 2, 4, 7, 8])
@pytest.mark.parametrize(("top_k", "rows"), [(2, 1), (4, 1), (2, 3)])
def test_a_layer_is_cold_as_often_as_tokens_draw_one(num_hot: int, top_k: int, rows: int) -> None:
    routes = DrawnRoutes(Law(), seed=2, num_layers=1, num_experts=8, top_k=top_k)
    steps = [routes.ids(0, n * rows, (n + 1) * rows) for n in range(2000)]
    drawn = np.mean([(ids >= num_hot).any() for ids in steps])
    each = top_k / 8
    layer = LayerChances((each,) * num_hot, (each,) * (8 - num_hot))
    assert layer.cold_chance(rows) == pytest.approx(drawn, abs=0.03)


@given(st.integers(2, 64), st.integers(1, 8), st.floats(0, 1), st.integers(1, 8))
def test_a_layer_that_is_cold_has_one_such_expert_at_least(
    num_experts: int, top_k: int, hit_rate: float, rows: int
) -> None:
    top_k, num_hot = min(top_k, num_experts), num_experts // 2
    hot = min(hit_rate * top_k / num_hot, 1.0)
    cold = (top_k - hot * num_hot) / (num_experts - num_hot)
    if cold > 1:
        return
    layer = LayerChances((hot,) * num_hot, (cold,) * (num_experts - num_hot))
    assert 0 <= layer.cold_chance(rows) <= min(1.0, distinct(layer.cold, rows))


def test_where_all_are_chosen_each_is_certain() -> None:
    assert law_chances(Law(skew=3.0), 4, 4).tolist() == [1.0] * 4
    assert law_chances(Law(), 8, 2).tolist() == pytest.approx([0.25] * 8)


def test_a_placement_divides_the_chances() -> None:
    shares_LE = np.array([[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.4, 0.3, 0.2, 0.1]])
    placement = Placement.of([{0, 2}, (), {3}])
    first, last = placed_chances(shares_LE, placement, [0, 2], 2)
    assert first == LayerChances((1.0, 0.2), (0.2, 0.2))  # nobody is chosen twice
    assert last.hot == pytest.approx((0.2,)) and last.cold == pytest.approx((0.8, 0.6, 0.4))
    assert last.hit_rate == pytest.approx(0.1)


@given(st.integers(0, 8), st.floats(0, 1), st.floats(0, 2))
def test_a_hit_rate_is_kept_where_nothing_is_known_of_ranks(
    num_hot: int, hit_rate: float, skew: float
) -> None:
    chance_E = law_chances(Law(skew=skew), 8, 2)
    (layer,) = blind_chances(chance_E, Placement.of([range(num_hot)]), [0], hit_rate)
    assert len(layer.hot) == num_hot and len(layer.cold) == 8 - num_hot
    assert all(0 <= chance <= 1 for chance in (*layer.hot, *layer.cold))
    if 0 < num_hot < 8 and max((*layer.hot, *layer.cold)) < 1:
        assert layer.hit_rate == pytest.approx(hit_rate, abs=1e-9)


@given(st.lists(st.floats(0.001, 1), max_size=20), st.integers(1, 3000))
def test_counts_are_of_as_many_experts_as_are_distinct(chances: list[float], tokens: int) -> None:
    counts = token_counts(chances, tokens)
    assert len(counts) == round(distinct(chances, tokens))
    assert counts == sorted(counts, reverse=True) and all(count >= 1 for count in counts)
    if counts:
        assert sum(counts) == pytest.approx(sum(chances) * tokens, abs=2 * len(counts) + 1)


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(1, 50))
def test_more_tokens_never_choose_fewer_experts(chances: list[float], tokens: int) -> None:
    few, more = distinct(chances, tokens), distinct(chances, tokens + 1)
    assert few <= more + 1e-12 and more <= len(chances) + 1e-12

"""Tables of expert times: curves through hand-made points, and one that is measured."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts, dense_experts, packed_experts
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.times import TimeTable, _never_falls, measure_times
from cpu_kernels.weight_kind import parse_kind


@st.composite
def tables(draw: st.DrawFn) -> TimeTable:
    """Any table; some curves have level pieces."""
    tokens = sorted(draw(st.sets(st.integers(1, 300), min_size=1, max_size=6)))
    steps = st.lists(
        st.floats(0, 1e-2, allow_subnormal=False), min_size=len(tokens), max_size=len(tokens)
    )
    curve = steps.map(lambda found: tuple(itertools.accumulate([1e-6 + found[0], *found[1:]])))
    return TimeTable(
        kernel="bf16/bf16",
        hidden=64,
        width=32,
        tokens=tuple(tokens),
        rows_s=draw(curve),
        columns_s=draw(st.none() | curve),
    )


def table(rows_s: tuple[float, ...], columns_s: tuple[float, ...] | None = None) -> TimeTable:
    return TimeTable(
        kernel="bf16/bf16",
        hidden=4,
        width=4,
        tokens=(1, 10, 20),
        rows_s=rows_s,
        columns_s=columns_s,
    )


@given(tables())
def test_time_is_exact_at_the_points_and_never_falls(found: TimeTable) -> None:
    for by_columns, seconds in ((False, found.rows_s), (True, found.columns_s)):
        if seconds is not None:
            times = [found.time(n, by_columns=by_columns) for n in range(400)]
            assert [times[n] for n in found.tokens] == list(seconds)
            assert times == sorted(times)
            assert times[0] == 0


@given(tables())
def test_json_gives_the_same_table(found: TimeTable) -> None:
    assert TimeTable.from_json(found.to_json()) == found


@given(tables())
def test_the_switch_over_is_where_columns_begin_to_stay_faster(found: TimeTable) -> None:
    first, last = found.switch_over(), found.tokens[-1]
    if found.columns_s is None:
        assert first is None
        return
    is_faster = [found.time(n, by_columns=True) < found.time(n) for n in range(last + 1)]
    if first is None:
        assert not is_faster[last]
    else:
        assert all(is_faster[first:])
        assert not is_faster[first - 1]
    for n in range(last + 50):
        both = (found.time(n), found.time(n, by_columns=True))
        assert found.best(n) == min(both)


@given(tables(), st.data())
def test_noise_on_a_curve_is_never_made_more(found: TimeTable, data: st.DataObject) -> None:
    """Nor is anything taken below the curve: more tokens mend a point that was disturbed."""
    true_s = found.rows_s
    noise = st.lists(st.floats(0, 1e-1), min_size=len(true_s), max_size=len(true_s))
    noisy_s = [t + n for t, n in zip(true_s, data.draw(noise), strict=True)]
    curve = _never_falls(noisy_s)
    assert list(curve) == sorted(curve)
    for n, seconds in enumerate(curve):
        assert true_s[n] <= seconds == min(noisy_s[n:])


def test_between_and_beyond_the_points() -> None:
    found = table((1.0, 10.0, 30.0), (5.0, 5.0, 5.0))
    assert [found.time(n) for n in (1, 4, 15, 25)] == [1.0, 4.0, 20.0, 40.0]
    assert (found.time(100, by_columns=True), found.best(25)) == (5.0, 5.0)
    assert found.switch_over() == 6
    assert table((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)).switch_over() is None
    assert table((4.0, 4.0, 4.0), (1.0, 2.0, 3.0)).switch_over() == 1
    with pytest.raises(ValueError, match="never computed by columns"):
        table((1.0, 2.0, 3.0)).time(1, by_columns=True)


@pytest.mark.parametrize(
    ("tokens", "rows_s"),
    [
        ((), ()),
        ((0, 1), (1.0, 2.0)),
        ((2, 1), (1.0, 2.0)),
        ((1, 2), (2.0, 1.0)),
        ((1, 2), (1.0,)),
        ((1, 2), (0.0, 1.0)),
    ],
)
def test_what_is_no_curve_is_refused(tokens: tuple[int, ...], rows_s: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must"):
        TimeTable(kernel="f32/f32", hidden=4, width=4, tokens=tokens, rows_s=rows_s)


@pytest.mark.parametrize("text", ["[]", "{}", '{"tokens": 3}', "no JSON", '{"tokens": [1]}'])
def test_json_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        TimeTable.from_json(text)


def bf16_experts() -> Experts:
    weights = np.full((4, 64, 64), 0x3C00, np.uint16)
    return dense_experts(weights, weights[:, :32].reshape(4, 64, 32).copy())


def packed(kind: str) -> Experts:
    shape = PackedShape(parse_kind(kind), 64, 32)
    return packed_experts(np.zeros((3, shape.expert_bytes), np.uint8), shape)


@pytest.mark.parametrize(
    ("experts", "activations", "has_columns"),
    [
        (bf16_experts(), "bf16", True),
        (bf16_experts(), "f32", False),
        (packed("w8g32"), "int8", False),
        (packed("bf12"), "bf16", True),
        (packed("bf12"), "f32", False),
    ],
)
def test_a_tiny_layer_is_measured(
    experts: Experts, activations: Activations, has_columns: bool
) -> None:
    with ExpertPool(2) as pool:
        found = measure_times(
            pool, experts, activations, tokens=(1, 3, 16), routed=2, budget_s=0.05
        )
        assert pool.add_layer(experts, activations=activations).number <= 3  # both were removed
    assert found.kernel == f"{experts.kind.name}/{activations}"
    assert (found.hidden, found.width) == (experts.hidden, experts.width)
    assert (found.columns_s is not None) == has_columns
    assert 0 < found.time(1) <= found.best(600)

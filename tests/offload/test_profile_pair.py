"""Two profiles compared and merged: against sums by hand, and what must hold of any two."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import ProfileError
from offload.popularity import Popularity, Profile
from offload.profile_pair import compare, divergence_bits, merge


def profile(counts: Any, **changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "model": "org/name",
        "architecture": None,
        "revision": "abc",
        "corpus_sha256": "a",
        "num_tokens": 4,
        "popularity": Popularity(np.array(counts)),
        "created": "now",
    }
    return Profile(**(fields | changes))


tables = st.lists(
    st.lists(st.integers(0, 30), min_size=8, max_size=8), min_size=3, max_size=3
).filter(lambda rows: any(map(any, rows)))


def test_equal_profiles_are_alike() -> None:
    rows = [[9, 1, 0, 4] * 2, [0] * 8, [1, 2, 3, 4, 5, 6, 7, 8]]
    found = compare(profile(rows), profile(rows))
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert all(layer.overlap == 1.0 for layer in found.layers)
    assert all(layer.divergence_bits == pytest.approx(0, abs=1e-12) for layer in found.layers)
    for row in found.transfers:
        assert row.first == row.second >= row.uniform
    assert [row.num_resident for row in found.transfers] == [2, 4, 8]


def test_opposite_profiles_are_not() -> None:
    first, second = [[1000, 1000, 0, 0, 0, 0, 0, 0]], [[0, 0, 1000, 1000, 0, 0, 0, 0]]
    found = compare(profile(first), profile(second))
    assert found.layers[0].overlap == 0.0
    assert found.layers[0].divergence_bits > 0.9
    assert found.transfers[1].first == 0.0 and found.transfers[1].second == 1.0


@given(tables, tables)
def test_what_holds_of_any_two(first: list[list[int]], second: list[list[int]]) -> None:
    there, back = (compare(profile(a), profile(b)) for a, b in ((first, second), (second, first)))
    assert there.layers == back.layers
    for layer in there.layers:
        assert 0.0 <= layer.overlap <= 1.0 and 0.0 <= layer.divergence_bits <= 1.0
    for row in there.transfers:
        assert 0.0 <= row.first <= 1.0


def test_divergence_by_hand() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    wanted = sum(
        (a * math.log2(2 * a / (a + b)) + b * math.log2(2 * b / (a + b))) / 2
        for a, b in ((0.5, 0.25), (0.5, 0.75))
    )
    assert divergence_bits(p, q) == pytest.approx([wanted])


@given(tables, tables)
def test_merged_counts_add_up_in_either_order(
    first: list[list[int]], second: list[list[int]]
) -> None:
    one, other = profile(first), profile(second, corpus_sha256="b", num_tokens=7)
    there, back = merge(one, other), merge(other, one)
    assert (there.popularity.counts_LE == np.array(first) + np.array(second)).all()
    assert (there.popularity.counts_LE == back.popularity.counts_LE).all()
    assert (there.num_tokens, there.revision) == (11, "abc")
    assert there.corpus_sha256 == back.corpus_sha256 not in ("a", "b")


def test_revisions_that_differ_are_not_named() -> None:
    rows = [[1, 2]]
    merged = merge(profile(rows), profile(rows, corpus_sha256="b", revision="x", model="name"))
    assert merged.revision is None


@pytest.mark.parametrize(("one", "other"), [("a", "a"), ("a", None), (None, "a")])
def test_profiles_of_one_architecture_are_of_one_model(one: str | None, other: str | None) -> None:
    """By name where one of them knows none."""
    name = "org/other" if one == other else "name"
    second = profile([[2, 2]], architecture=other, model=name, corpus_sha256="b")
    both = merge(profile([[1, 2]], architecture=one), second)
    assert both.architecture == "a" and both.model == "org/name"


def test_profiles_of_two_architectures_are_refused_whatever_their_names() -> None:
    second = profile([[2, 2]], architecture="b", corpus_sha256="b")
    with pytest.raises(ProfileError, match=r"org/name \(a\) and org/name \(b\)"):
        merge(profile([[1, 2]], architecture="a"), second)


@pytest.mark.parametrize("other", [{"model": "org/other"}, {"popularity": Popularity([[1, 2, 3]])}])
def test_profiles_of_two_models_are_refused(other: dict[str, Any]) -> None:
    for pair in (compare, merge):
        with pytest.raises(ProfileError, match="of different models: org/name"):
            pair(profile([[1, 2]]), profile([[1, 2]], **{"corpus_sha256": "b"} | other))


def test_one_text_is_not_counted_twice() -> None:
    with pytest.raises(ProfileError, match="of the same text"):
        merge(profile([[1, 2]]), profile([[2, 2]]))


def test_empty_profiles_are_not_compared() -> None:
    with pytest.raises(ProfileError, match="counted anything"):
        compare(profile([[0, 0]]), profile([[0, 0]]))

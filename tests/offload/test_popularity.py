"""Popularity's arithmetic, and a profile file that is either whole or refused in one sentence."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fiddler.errors import ProfileError
from offload.placement import Placement
from offload.popularity import Popularity, Profile, hit_rate, load_profile, save_profile
from tests.offload.planner_cases import popularities

COUNTS = [[5, 0, 3], [0, 0, 0]]


def profile(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "model": "org/name",
        "architecture": None,
        "revision": "abc",
        "corpus_sha256": "0" * 64,
        "num_tokens": 4,
        "popularity": Popularity(np.array(COUNTS)),
        "created": "2026-11-21T12:00:00+00:00",
    }
    return Profile(**(fields | changes))


def load(
    path: Path,
    model: str = "org/name",
    shape: tuple[int, int] = (2, 3),
    architecture: str | None = None,
) -> Profile:
    return load_profile(
        path, model=model, architecture=architecture, num_layers=shape[0], num_experts=shape[1]
    )


@given(popularities(3, 4))
def test_shares_are_distributions_in_the_order_of_the_counts(popularity: Popularity) -> None:
    shares_LE = popularity.shares()
    assert (shares_LE > 0).all()
    assert shares_LE.sum(axis=1) == pytest.approx(np.ones(3))
    for counts, shares in zip(popularity.counts_LE, shares_LE, strict=True):
        assert np.array_equal(counts[:, None] < counts, shares[:, None] < shares)


def test_entropy_is_full_for_even_use_and_falls_with_skew() -> None:
    even, skewed = Popularity(np.array([[100] * 8, [793, 1, 1, 1, 1, 1, 1, 1]])).entropy_bits()
    assert even == pytest.approx(math.log2(8))
    assert 0 < skewed < 0.2


@given(popularities(2, 3), st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2)))
def test_hit_rate_counts_one_by_one(
    popularity: Popularity, first: set[int], second: set[int]
) -> None:
    resident = (first, second)
    routes = [
        expert in resident[layer]
        for layer in range(2)
        for expert in range(3)
        for _ in range(popularity.counts_LE[layer, expert])
    ]
    expected = sum(routes) / len(routes) if routes else 0.0
    assert hit_rate(Placement.of(resident), popularity.counts_LE) == pytest.approx(expected)


def test_only_equal_counts_are_uniform() -> None:
    assert Popularity.uniform(2, 3).is_uniform
    assert Popularity(np.array([[4, 4, 4], [0, 0, 0]])).is_uniform
    assert not Popularity(np.array(COUNTS)).is_uniform


def test_counts_cannot_be_changed_later() -> None:
    counts_LE = np.array(COUNTS)
    popularity = Popularity(counts_LE)
    counts_LE[0, 0] = 99
    assert popularity.counts_LE[0, 0] == 5
    with pytest.raises(ValueError, match="read-only"):
        popularity.counts_LE[0, 0] = 99


# --- the file ---


def test_a_saved_profile_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(profile(), path)
    loaded = load(path)
    assert loaded.popularity.counts_LE.tolist() == COUNTS
    for name in ("model", "architecture", "revision", "corpus_sha256", "num_tokens", "created"):
        assert getattr(loaded, name) == getattr(profile(), name)
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]


def test_a_local_copy_may_use_the_hubs_profile(tmp_path: Path) -> None:
    save_profile(profile(), tmp_path / "profile.json")
    assert load(tmp_path / "profile.json", model="name").num_tokens == 4


@pytest.mark.parametrize(("model", "shape"), [("org/other", (2, 3)), ("org/name", (2, 4))])
def test_a_profile_of_another_model_is_refused(
    tmp_path: Path, model: str, shape: tuple[int, int]
) -> None:
    save_profile(profile(), tmp_path / "profile.json")
    with pytest.raises(ProfileError, match=r"is of org/name \(2 layers, 3 experts\), not of"):
        load(tmp_path / "profile.json", model, shape)


def test_a_renamed_model_keeps_its_profile(tmp_path: Path) -> None:
    save_profile(profile(architecture="a"), tmp_path / "profile.json")
    found = load(tmp_path / "profile.json", "some/copy", architecture="a")
    assert found.name_for("elsewhere/name") == found.name
    assert found.name_for("copy") == f"{found.name}, made with org/name"


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    save_profile(profile(architecture="a"), tmp_path / "profile.json")
    with pytest.raises(ProfileError, match=r"is of org/name \(a\), not of org/name \(b\)"):
        load(tmp_path / "profile.json", architecture="b")


@pytest.mark.parametrize("architecture", ["a", None])
def test_an_earlier_releases_profile_is_bound_to_a_name(
    tmp_path: Path, architecture: str | None
) -> None:
    path = tmp_path / "profile.json"
    save_profile(profile(), path)
    record = json.loads(path.read_text())
    del record["architecture"]
    path.write_text(json.dumps(record))
    assert load(path, "name", architecture=architecture).architecture is None
    with pytest.raises(ProfileError, match=r"org/name \(2 layers, 3 experts\), not of other \(2"):
        load(path, "other", architecture=architecture)


def test_counts_of_too_few_layers_are_damage_not_another_model(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(profile(architecture="two layers"), path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"counts": record["counts"][:1]}))
    with pytest.raises(ProfileError, match="counts are of 1 layer and 3 experts, not 2 and 3"):
        load(path, architecture="two layers")


DAMAGE: dict[str, Any] = {
    "version": [2, None, "1"],
    "model": [None, 3],
    "revision": [3, []],
    "architecture": [3, []],
    "num_tokens": [-1, 1.5, True, "4"],
    "created": [None],
    "corpus_sha256": [7],
    "counts": [
        None,
        [],
        [[]],
        [1],
        [[1, 2], [3]],
        [[1, -1, 2]] * 2,
        [[1.0, 2, 3]] * 2,
        [[1 << 64]],
        [[0, 0, 0]] * 2,
    ],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in DAMAGE.items() for value in values]
)
def test_a_damaged_field_is_one_sentence(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "profile.json"
    save_profile(profile(), path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {key: value}))
    with pytest.raises(ProfileError, match="is not a usable profile: ") as caught:
        load(path)
    assert "\n" not in caught.value.message and caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 10_000])
def test_what_is_no_json_object_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="is not a usable profile: "):
        load(path)


@given(cut=st.integers(0, 1 << 30))
def test_a_cut_file_is_never_half_read(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "profile.json"
    save_profile(profile(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ProfileError):
        load(path)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read: No such file"):
        load(tmp_path / "none.json")


def test_a_failed_save_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "profile.json"
    save_profile(profile(num_tokens=1), path)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("offload.whole_file.os.fsync", full_disk)
    with pytest.raises(ProfileError, match="cannot be written: No space left on device"):
        save_profile(profile(num_tokens=2), path)
    monkeypatch.undo()
    assert load(path).num_tokens == 1
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]

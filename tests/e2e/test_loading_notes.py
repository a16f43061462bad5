"""What is said of a plan when a model is loaded."""

from pathlib import Path

import numpy as np
import pytest

from offload.popularity import Popularity, Profile, save_profile
from tests.e2e.conftest import open_folder
from tests.model.test_parity import split_at_random
from tests.tiny_models import shared_tiny

NOTHING = "the profile changes nothing: all experts are in one memory"


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """Of the tiny Mixtral."""
    path = tmp_path / "profile.json"
    made = Profile(
        model=shared_tiny("mixtral").name,
        architecture=None,
        revision=None,
        corpus_sha256="text",
        num_tokens=10,
        popularity=Popularity(np.arange(1, 25).reshape(3, 8)),
        created="now",
    )
    save_profile(made, path)
    return str(path)


@pytest.mark.parametrize(("has_profile", "is_split"), [(True, False), (True, True), (False, False)])
def test_a_profile_that_chooses_nothing_is_said_once(
    profile: str, caplog: pytest.LogCaptureFixture, has_profile: bool, is_split: bool
) -> None:
    folder = shared_tiny("mixtral")
    placement = split_at_random(folder, seed=1) if is_split else None
    asked = profile if has_profile else None
    with open_folder(folder, profile=asked, placement=placement) as llm:
        notes = [note for note in llm.plan.notes if note == NOTHING]
    said = [r.getMessage() for r in caplog.records if r.getMessage() == NOTHING]
    assert len(said) == len(notes) == (has_profile and not is_split)

"""A running fake hub and a pull from it into a fresh cache."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, Repo, serve, sharded_files

from fiddler.hub import ModelFolder, download, resolve_model

Pull = Callable[..., ModelFolder]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with one good repository; downloads from it retry at once."""
    monkeypatch.setattr(download, "RETRY_S", 0.0)
    monkeypatch.setattr(download, "CHUNK_BYTES", 4096)
    with serve(FakeHub(repos={"acme/moe": Repo(sharded_files())})) as running:
        yield running


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """An empty cache folder, which does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def pull(hub: FakeHub, cache_dir: Path) -> Pull:
    """``resolve_model`` against the fake hub and the fresh cache."""

    def run(model: str = "acme/moe", **options: Any) -> ModelFolder:
        return resolve_model(model, endpoint=hub.endpoint, cache_dir=cache_dir, **options)

    return run

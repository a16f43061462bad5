"""A fake model for every command."""

import pytest
from fake_llm import FakeLLM

from fiddler.cli import session


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeLLM]:
    """Every command gets a fake model; they are listed here as they are opened."""
    opened: list[FakeLLM] = []

    def open_llm(**options: object) -> FakeLLM:
        opened.append(FakeLLM(**options))
        return opened[-1]

    monkeypatch.setattr(session, "open_llm", open_llm)
    return opened

"""The ``fiddler`` command with a fake model, for tests that need a real process and terminal."""

from fake_llm import FakeLLM

from fiddler.cli import main, session

session.open_llm = FakeLLM  # type: ignore[assignment]
main()

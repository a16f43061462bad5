"""A bar of finished requests for whoever asks for one, by vLLM's name."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fiddler import LLM, SamplingParams
from fiddler.errors import ConfigError
from tests.e2e.conftest import OpenModel

PARAMS = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (2, 5, 5, 9)]
CHAT = [{"role": "user", "content": "a"}]
Seen = list[tuple[Any, ...]]


class Terminal(io.StringIO):
    """Standard error of a person."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def llm(model: OpenModel) -> LLM:
    return model("mixtral")


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What every bar was told."""
    seen: Seen = []

    @contextmanager
    def remembered() -> Iterator[Any]:
        yield lambda *told: seen.append(told)

    monkeypatch.setattr("fiddler.progress.progress_bars", remembered)
    return seen


def test_a_bar_counts_finished_requests_as_on_progress_does(llm: LLM, bars: Seen) -> None:
    told: Seen = []
    llm.generate(list("abcd"), PARAMS, use_tqdm=True, on_progress=lambda *at: told.append(at))
    assert bars == [("requests", *at) for at in told] and told[-1] == (4, 4)
    bars.clear()
    llm.chat([CHAT] * 4, PARAMS, use_tqdm=True)
    assert [done for _, done, _ in bars] == sorted({done for _, done, _ in bars})
    assert bars[-1] == ("requests", 4, 4)
    bars.clear()
    llm.generate("a", PARAMS[0], use_tqdm=True)
    assert bars[-1] == ("requests", 1, 1)


def test_unasked_there_is_no_bar(llm: LLM, bars: Seen) -> None:
    for asked in ({}, {"use_tqdm": False}):
        llm.generate(list("abcd"), PARAMS, **asked)
        llm.chat(CHAT, PARAMS[0], **asked)
    assert bars == []


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("use_tqdm", [True, False])
def test_the_bar_is_drawn_on_a_terminal_and_leaves_results_alone(
    llm: LLM, stream: type[io.StringIO], use_tqdm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [output.text for output in llm.generate(list("abcd"), PARAMS)]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream())
    found = [output.text for output in llm.generate(list("abcd"), PARAMS, use_tqdm=use_tqdm)]
    drawn = sys.stderr.getvalue()
    assert found == plain
    if use_tqdm and stream is Terminal:
        assert "requests" in drawn and "of 4" in drawn
    else:
        assert drawn == ""


@pytest.mark.parametrize("wrong", ["no", None, 1, print])
def test_anything_else_is_one_sentence_and_nothing_runs(llm: LLM, wrong: Any) -> None:
    free = llm.num_free_pages
    for ask in (lambda: llm.generate("a", use_tqdm=wrong), lambda: llm.chat(CHAT, use_tqdm=wrong)):
        with pytest.raises(ConfigError, match="use_tqdm must be True or False"):
            ask()
    assert llm.num_free_pages == free

"""One answer: reasoning told apart, cancelled between two tokens, always closed."""

import threading

import pytest
from fake_llm import FakeStream

from fiddler.cli.turn import run_turn
from fiddler.text.reasoning import ReasoningSplitter

WORDS = ["<thi", "nk>", "hmm ", "well", "</think>", "yes", " sir"]


class Recorder:
    """A view that remembers; it sets ``stop`` after some answers."""

    def __init__(self, stop: threading.Event | None = None, after: int = 0) -> None:
        self.shown: list[tuple[str, str]] = []
        self._stop, self._after = stop, after

    def reasoning(self, text: str) -> None:
        self.shown.append(("reasoning", text))

    def answer(self, text: str) -> None:
        self.shown.append(("answer", text))
        if self._stop is not None and len(self.shown) == self._after:
            self._stop.set()


def stream(words: list[str]) -> FakeStream:
    return FakeStream(words, (0, 0), prompt_tokens=3, limit=100)


def test_reasoning_and_answer_go_to_their_places() -> None:
    view = Recorder()
    turn = run_turn(stream(WORDS), view, threading.Event(), splitter=ReasoningSplitter())
    assert (turn.reasoning, turn.answer) == ("hmm well", "yes sir")
    assert turn.text == "".join(WORDS)
    assert "".join(text for kind, text in view.shown if kind == "answer") == "yes sir"
    assert turn.finish_reason == "stop"
    assert turn.stats.output_tokens == len(WORDS)


def test_without_a_splitter_all_text_is_answer() -> None:
    turn = run_turn(stream(WORDS), Recorder(), threading.Event(), splitter=None)
    assert (turn.reasoning, turn.answer) == ("", "".join(WORDS))


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_cancelled_answer_keeps_what_was_written(after: int) -> None:
    stop = threading.Event()
    words = [f"{n} " for n in range(10)]
    events = stream(words)
    turn = run_turn(events, Recorder(stop, after), stop, splitter=None)
    assert turn.text == "".join(words[:after])
    assert turn.finish_reason == "cancelled"
    assert events.is_closed


def test_a_stop_during_the_last_token_is_no_cancellation() -> None:
    stop = threading.Event()
    turn = run_turn(stream(["a", "b"]), Recorder(stop, 2), stop, splitter=None)
    assert (turn.text, turn.finish_reason) == ("ab", "stop")


def test_the_stream_is_closed_when_the_view_fails() -> None:
    class Broken(Recorder):
        def answer(self, text: str) -> None:
            raise BrokenPipeError

    events = stream(["a", "b"])
    with pytest.raises(BrokenPipeError):
        run_turn(events, Broken(), threading.Event(), splitter=None)
    assert events.is_closed

"""One answer: from the model's events to a view, with the reasoning told apart."""

import threading
from dataclasses import dataclass
from typing import Protocol

from fiddler.cli.session import Stream
from fiddler.outputs import RunStats
from fiddler.text.reasoning import Piece, ReasoningSplitter


class View(Protocol):
    """Shows an answer while it grows."""

    def reasoning(self, text: str) -> None: ...
    def answer(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What came of one answer; ``text`` is all of it, as the model wrote it."""

    text: str
    answer: str
    reasoning: str
    finish_reason: str
    stop_reason: int | str | None
    stats: RunStats


def run_turn(
    stream: Stream, view: View, stop: threading.Event, *, splitter: ReasoningSplitter | None
) -> Turn:
    """Show ``stream`` in ``view`` until it ends or ``stop`` is set, which cancels it.

    Without a ``splitter`` all text is answer.
    """
    texts: list[str] = []
    pieces: list[Piece] = []
    finish_reason, stop_reason, stats = "cancelled", None, RunStats()

    def show(piece: Piece) -> None:
        pieces.append(piece)
        if piece.reasoning:
            view.reasoning(piece.reasoning)
        if piece.answer:
            view.answer(piece.answer)

    try:
        for event in stream:
            texts.append(event.text)
            show(splitter.push(event.text) if splitter else Piece(answer=event.text))
            stats = event.stats
            if event.finish_reason is not None:
                finish_reason, stop_reason = event.finish_reason, event.stop_reason
            elif stop.is_set():
                stream.close()  # the stream then says what it held back, and ends
    finally:
        stream.close()
    if splitter:
        show(splitter.flush())
    return Turn(
        text="".join(texts),
        answer="".join(piece.answer for piece in pieces),
        reasoning="".join(piece.reasoning for piece in pieces),
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        stats=stats,
    )

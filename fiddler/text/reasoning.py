"""Separates ``<think>...</think>`` from the answer while it streams."""

from dataclasses import dataclass
from enum import Enum

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """What became known: more reasoning, then more of the answer; either may be empty."""

    reasoning: str = ""
    answer: str = ""


class _State(Enum):
    UNDECIDED = "undecided"
    REASONING = "reasoning"
    ANSWER = "answer"


class ReasoningSplitter:
    """Splits a stream into one leading block of reasoning and the answer.

    Only a block that opens the reply counts (white space may come before it), so an answer that
    talks about the tag keeps it. ``starts_inside`` is for templates that end the prompt with the
    open tag; :func:`prompt_opens_reasoning` tells. The tags, and white space before the open tag,
    are dropped; every other character comes out once and in order.
    """

    def __init__(self, *, starts_inside: bool = False) -> None:
        self._state = _State.REASONING if starts_inside else _State.UNDECIDED
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """Whether the reply so far ends inside the block."""
        return self._state is _State.REASONING

    def push(self, text: str) -> Piece:
        """Take more of the reply and return what is settled by it."""
        text, self._held = self._held + text, ""
        if self._state is _State.UNDECIDED:
            return self._open(text)
        if self._state is _State.REASONING:
            return self._close(text)
        return Piece(answer=text)

    def flush(self) -> Piece:
        """Return what is held back; called once at the end of the reply."""
        held, self._held = self._held, ""
        return Piece(reasoning=held) if self.is_reasoning else Piece(answer=held)

    def _open(self, text: str) -> Piece:
        body = text.lstrip()
        if body.startswith(OPEN_TAG):
            self._state = _State.REASONING
            return self._close(body[len(OPEN_TAG) :])
        if OPEN_TAG.startswith(body):
            self._held = text
            return Piece()
        self._state = _State.ANSWER
        return Piece(answer=text)

    def _close(self, text: str) -> Piece:
        reasoning, tag, answer = text.partition(CLOSE_TAG)
        if tag:
            self._state = _State.ANSWER
            return Piece(reasoning, answer)
        keep = len(text) - _num_begun(text, CLOSE_TAG)
        self._held = text[keep:]
        return Piece(reasoning=text[:keep])


def prompt_opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt ends with the open tag, so that the reply starts inside."""
    return prompt.rstrip().endswith(OPEN_TAG)


def _num_begun(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that begins ``tag``."""
    sizes = range(min(len(text), len(tag) - 1), 0, -1)
    return next((n for n in sizes if tag.startswith(text[-n:])), 0)

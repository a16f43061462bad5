"""A conversation as a value: every change gives a new one, so a failed turn changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

ROLES = ("user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One message; ``finish_reason`` says how an answer ended and is empty for the user's."""

    role: str
    content: str
    finish_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A system prompt ("" is none), then user and assistant in turn.

    ``attached`` are file texts that go in front of the next user message.
    """

    system: str = ""
    messages: tuple[Message, ...] = ()
    attached: tuple[str, ...] = ()

    def ask(self, text: str) -> Self:
        """Add a user message, with what was attached in front of it."""
        assert not self.is_waiting, "two user messages in a row"
        content = "\n\n".join([*self.attached, text])
        return replace(self, messages=(*self.messages, Message("user", content)), attached=())

    def answered(self, text: str, finish_reason: str) -> Self:
        """Add the answer to the last user message."""
        assert self.is_waiting, "an answer to nothing"
        message = Message("assistant", text, finish_reason)
        return replace(self, messages=(*self.messages, message))

    def asked_again(self) -> Self:
        """Drop the last answer, so that its question waits again."""
        assert self.messages and not self.is_waiting, "nothing was answered"
        return replace(self, messages=self.messages[:-1])

    def undone(self) -> Self:
        """Drop the last question and its answer."""
        assert self.messages and not self.is_waiting, "nothing was answered"
        return replace(self, messages=self.messages[:-2])

    def without_oldest(self, count: int) -> Self:
        """Drop the first ``count`` questions and their answers."""
        assert not self.is_waiting and count >= 0, "a question waits, or nonsense was asked"
        return replace(self, messages=self.messages[2 * count :])

    def cleared(self) -> Self:
        """Keep only the system prompt."""
        return replace(self, messages=(), attached=())

    def attach(self, text: str) -> Self:
        """Put ``text`` in front of the next user message, after earlier attachments."""
        return replace(self, attached=(*self.attached, text))

    def detached(self) -> Self:
        """Drop the last attachment."""
        return replace(self, attached=self.attached[:-1])

    @property
    def is_waiting(self) -> bool:
        """Whether the last message is a question without an answer."""
        return bool(self.messages) and self.messages[-1].role == "user"

    @property
    def num_turns(self) -> int:
        """Questions so far."""
        return sum(message.role == "user" for message in self.messages)

    def for_model(self) -> list[dict[str, str]]:
        """The messages as chat templates want them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + [{"role": m.role, "content": m.content} for m in self.messages]


def alternates(messages: Sequence[Message]) -> bool:
    """Whether ``messages`` are user and assistant in turn, ending with an answer."""
    roles = [message.role for message in messages]
    return roles == list(ROLES) * (len(roles) // 2)

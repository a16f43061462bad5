"""A running chat: takes turns and commands, and keeps what was said."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from fiddler.cli.chat_actions import TABLE, LeaveChat
from fiddler.cli.chat_commands import find_command, parse_command
from fiddler.cli.chat_view import answer_view, note_stats, show_finish
from fiddler.cli.console import note
from fiddler.cli.conversation import Conversation
from fiddler.cli.errors import is_closed_pipe, print_error, sentence
from fiddler.cli.expected import Expected
from fiddler.cli.interrupts import silent_keyboard, stop_on_interrupt
from fiddler.cli.session import ChatModel, opens_reasoning
from fiddler.cli.stats_line import Totals
from fiddler.cli.thinking import ENABLE_THINKING
from fiddler.cli.turn import Turn, run_turn
from fiddler.errors import PromptError
from fiddler.outputs import RunStats
from fiddler.sampling_params import SamplingParams
from fiddler.text.reasoning import OPEN_TAG, ReasoningSplitter

# What other programs are left with; models are asked such a thing by mistake only.
WORDS_TO_LEAVE = ("exit", "quit", "bye")


@dataclass(slots=True, kw_only=True)
class Chat:
    """All that a chat remembers. ``defaults`` are the model's own parameters."""

    llm: ChatModel
    params: SamplingParams
    defaults: SamplingParams
    conversation: Conversation = field(default_factory=Conversation)
    think: str = "auto"
    show_reasoning: bool = True
    is_quiet: bool = False
    is_interactive: bool = False
    is_debug: bool = False
    totals: Totals = field(default_factory=Totals)
    last_stats: RunStats | None = None
    expected: Expected = field(init=False)
    path: Path | None = None  # where the chat was last saved or loaded

    def __post_init__(self) -> None:
        self.expected = Expected(self.llm)

    def run(self, turns: Iterable[str]) -> bool:
        """Take turns until there are no more; whether all of them went well.

        An error costs its turn, never the conversation.
        """
        is_good = True
        for text in turns:
            try:
                self.take(text)
            except LeaveChat:
                break
            except Exception as error:
                if self.is_debug or is_closed_pipe(error):
                    raise
                is_good = False
                explained = sentence(error)
                print_error(explained.message, explained.hint)
        return is_good

    def take(self, text: str) -> None:
        """Run one command or answer one message."""
        command = parse_command(text)
        if command is not None:
            name, argument = command
            find_command(name, TABLE).run(self, argument)
        elif text.rstrip().lower() in WORDS_TO_LEAVE:
            note("/exit or Ctrl-D leaves; a blank in front sends the word to the model")
        elif text.strip():
            self.answer(self.conversation.ask(text))

    def answer(self, asked: Conversation) -> None:
        """Answer the question that waits in ``asked``; only then it becomes the conversation."""
        messages, thinking = asked.for_model(), ENABLE_THINKING[self.think]
        try:
            begins_inside = opens_reasoning(self.llm, messages, thinking)
            turn = self._stream(messages, thinking, begins_inside)
        except PromptError as error:
            raise PromptError(error.message, hint=self._cure(asked) or error.hint) from error
        if not turn.text:
            note("(nothing was written; the message is not kept)")
            return
        # The template takes reasoning out of earlier turns, if it sees where it begins.
        text = f"{OPEN_TAG}\n{turn.text}" if begins_inside else turn.text
        self.conversation = asked.answered(text, turn.finish_reason)
        self._report(turn)

    def _cure(self, asked: Conversation) -> str:
        """What makes room for ``asked``; nothing if that is not what it lacks."""
        allows = "; --context N at the start allows more" if self._may_grow() else ""
        if self._fits(asked):
            return ""
        if self._fits(replace(asked, messages=asked.messages[-1:])):
            return f"/forget drops the oldest exchange, /clear all{allows}"
        if self.conversation.attached:
            return f"/undo drops the file that was read{allows}"
        return f"this message alone is too long: shorten it{allows}"

    def _may_grow(self) -> bool:
        """Whether --context can ask for more: not beyond what the model was made for."""
        return self.llm.plan.context_tokens < self.llm.model_config.max_position

    def _fits(self, asked: Conversation) -> bool:
        thinking = ENABLE_THINKING[self.think]
        try:
            ids = self.llm.apply_chat_template(asked.for_model(), chat_template_kwargs=thinking)
        except PromptError:  # it is no text, however long
            return True
        return len(ids) < self.llm.plan.context_tokens

    def _stream(
        self, messages: list[dict[str, str]], thinking: dict[str, Any], begins_inside: bool
    ) -> Turn:
        view = answer_view(is_plain=not self.is_interactive, show_reasoning=self.show_reasoning)
        with stop_on_interrupt() as stop, silent_keyboard(), view:
            stream = self.llm.stream_chat(messages, self.params, chat_template_kwargs=thinking)
            splitter = ReasoningSplitter(starts_inside=begins_inside)
            return run_turn(stream, view, stop, splitter=splitter)

    def _report(self, turn: Turn) -> None:
        self.last_stats = turn.stats
        self.totals = self.totals.plus(turn.stats)
        num_tokens = turn.stats.prompt_tokens + turn.stats.output_tokens
        is_full = num_tokens >= self.llm.plan.context_tokens
        show_finish(turn.finish_reason, is_context_full=is_full, may_grow=self._may_grow())
        if not self.is_quiet:
            note_stats(turn.stats, self.expected)
        if self.is_interactive:
            click.echo()

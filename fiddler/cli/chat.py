"""``fiddler chat``: a conversation on the terminal, or one turn for each line of a pipe."""

import contextlib
from dataclasses import replace
from typing import Any

import click

from fiddler.cli import session
from fiddler.cli.options import engine_options, model_option, reasoning_options, sampling_options


@click.command()
@model_option
@reasoning_options
@click.option("--no-history", is_flag=True, help="Do not keep what is typed for later chats.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics after an answer.")
@sampling_options
@engine_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    system: str | None,
    think: str,
    hide_thinking: bool,
    no_history: bool,
    quiet: bool,
    sampling: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    """Talk with a model. /help in the chat lists its commands.

    From a pipe every line is a turn, and the answers are plain text.
    """
    from fiddler.cli.chat_actions import TABLE
    from fiddler.cli.chat_input import is_interactive, piped_turns, typed_turns
    from fiddler.cli.chat_session import Chat
    from fiddler.cli.conversation import Conversation
    from fiddler.cli.interrupts import silent_keyboard

    with silent_keyboard():
        opened = session.open_llm(model=model, **engine)
    with contextlib.closing(opened) as llm:
        session.require_chat_template(llm)
        defaults = llm.default_params()
        chat = Chat(
            llm=llm,
            defaults=defaults,
            params=replace(defaults, **sampling),
            conversation=Conversation(system=system or ""),
            think=think,
            show_reasoning=not hide_thinking,
            is_quiet=quiet,
            is_interactive=is_interactive(),
            is_debug=bool(ctx.find_root().params.get("debug")),
        )
        if chat.is_interactive:
            _greet(chat.llm.model_name, quiet)
            chat.run(typed_turns(TABLE, keep_history=not no_history))
        elif not chat.run(piped_turns()):
            ctx.exit(1)


def _greet(model_name: str, is_quiet: bool) -> None:
    from fiddler._version import __version__
    from fiddler.cli.console import note
    from fiddler.cli.stats_line import SEPARATOR

    if not is_quiet:
        parts = f"fiddler {__version__}", model_name, "/help lists commands, Ctrl-D leaves"
        note(SEPARATOR.join(parts))

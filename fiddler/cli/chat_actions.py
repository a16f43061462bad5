"""What the slash commands do, and the table that names them."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fiddler.cli.attachment import read_text_file
from fiddler.cli.chat_commands import SET_CHOICES, SlashCommand, help_lines
from fiddler.cli.chat_file import SavedChat, load_chat, save_chat
from fiddler.cli.console import echo, note, output_width
from fiddler.cli.expert_heatmap import heatmap_lines
from fiddler.cli.params_edit import assignment, edit_params, params_to_json
from fiddler.cli.stats_line import folded, stats_line
from fiddler.errors import ConfigError
from fiddler.prompts import check_params
from fiddler.wrapping import wrapped
from offload.units import counted

if TYPE_CHECKING:
    from fiddler.cli.chat_session import Chat

THINK = ("auto", "on", "off")
REASONING = ("show", "hide")


class LeaveChat(Exception):
    """Raised by ``/exit``."""


def _help(chat: "Chat", argument: str) -> None:
    for line in help_lines(TABLE, output_width()):
        click.echo(line)
    echo('Alt-Enter or """ begins another line; Ctrl-X Ctrl-E opens $EDITOR;')
    echo("Ctrl-C stops an answer; Ctrl-D leaves.")


def _exit(chat: "Chat", argument: str) -> None:
    raise LeaveChat


def _clear(chat: "Chat", argument: str) -> None:
    chat.conversation = chat.conversation.cleared()
    note("a new conversation; the system prompt stays")


def _regen(chat: "Chat", argument: str) -> None:
    _require_answer(chat, "answer again")
    chat.answer(chat.conversation.asked_again())


def _undo(chat: "Chat", argument: str) -> None:
    if chat.conversation.attached:
        chat.conversation = chat.conversation.detached()
        note("dropped the file that was read")
        return
    _require_answer(chat, "undo")
    chat.conversation = chat.conversation.undone()
    note(f"dropped the last exchange; {chat.conversation.num_turns} left")


def _forget(chat: "Chat", argument: str) -> None:
    _require_answer(chat, "forget")
    asked = argument or "1"
    if not (asked.isdecimal() and int(asked)):
        raise ConfigError(
            f"/forget takes a number of exchanges, not {asked!r}", hint="for example /forget 3"
        )
    count = min(int(asked), chat.conversation.num_turns)
    chat.conversation = chat.conversation.without_oldest(count)
    dropped = "exchange" if count == 1 else f"{count} exchanges"
    note(f"dropped the oldest {dropped}; {chat.conversation.num_turns} left")


def _require_answer(chat: "Chat", what: str) -> None:
    if not chat.conversation.messages:
        raise ConfigError(f"there is nothing to {what} yet")


def _system(chat: "Chat", argument: str) -> None:
    chat.conversation = replace(chat.conversation, system=argument)
    note("the system prompt is set" if argument else "there is no system prompt now")


def _set(chat: "Chat", argument: str) -> None:
    if not argument:
        _print_rows(_settings(chat))
        return
    edited = edit_params(chat.params, argument, chat.defaults)
    check_params(edited, vocab_size=chat.llm.model_config.vocab_size)
    chat.params = edited
    name, _ = assignment(argument)
    note(f"{name} = {getattr(chat.params, name)!r}")


def _show(chat: "Chat", argument: str) -> None:
    revision = f" at {chat.llm.revision}" if chat.llm.revision else ""
    rows = {
        "model": f"{chat.llm.model_name}{revision}",
        "system": chat.conversation.system or "none",
        "turns": str(chat.conversation.num_turns),
        "files read": str(len(chat.conversation.attached)),
        "think": f"{chat.think}, {'shown' if chat.show_reasoning else 'hidden'}",
    }
    _print_rows(rows | _settings(chat))


def _settings(chat: "Chat") -> dict[str, str]:
    """The parameters in force, as they are shown."""
    rows = {name: repr(value) for name, value in params_to_json(chat.params).items()}
    if chat.params.seed is None:
        rows["seed"] = f"{chat.llm.config.seed}, by --seed: another draw for each answer"
    return rows


def _print_rows(rows: dict[str, str]) -> None:
    names, width = max(map(len, rows)), output_width()
    for name, value in rows.items():
        label = f"{name:<{names}}  "
        for part in value.split("\n"):  # a system prompt may have lines of its own
            for line in wrapped(label, part, width) or [label.rstrip()]:
                click.echo(line)
            label = " " * len(label)


def _save(chat: "Chat", argument: str) -> None:
    path = _path(argument) if argument else chat.path
    if path is None:
        raise ConfigError("say where to save", hint="for example /save chat.json")
    saved = SavedChat(
        model=chat.llm.model_name,
        revision=chat.llm.revision,
        conversation=chat.conversation,
        params=params_to_json(chat.params),
        seed=chat.llm.config.seed,
    )
    save_chat(path, saved)
    chat.path = path
    note(f"saved {_turns(chat)} to {path}")


def _load(chat: "Chat", argument: str) -> None:
    if not argument:
        raise ConfigError("say what to load", hint="for example /load chat.json")
    path = _path(argument)
    saved = load_chat(path)
    known = {name: value for name, value in saved.params.items() if value is not None}
    chat.params = replace(chat.defaults, **known)
    chat.conversation, chat.path = saved.conversation, path
    note(f"loaded {_turns(chat)} from {path}")
    if saved.model != chat.llm.model_name:
        note(f"it was saved with {saved.model}; this is {chat.llm.model_name}")


def _read(chat: "Chat", argument: str) -> None:
    if not argument:
        raise ConfigError("say which file to read", hint="for example /read notes.txt")
    path = _path(argument)
    text = read_text_file(path)
    chat.conversation = chat.conversation.attach(text)
    note(f"read {path}, {len(text):,} characters: it goes in front of your next message")


def _stats(chat: "Chat", argument: str) -> None:
    last = stats_line(chat.last_stats) if chat.last_stats else "no answer yet"
    for label, line in (("last: ", last), ("all:  ", chat.totals.line())):
        for part in folded(line, _columns() - len(label)):
            click.echo(label + part)
            label = " " * len(label)


def _experts(chat: "Chat", argument: str) -> None:
    for line in heatmap_lines(chat.llm.expert_counts(), width=_columns()):
        click.echo(line)


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _think(chat: "Chat", argument: str) -> None:
    if argument in THINK:
        chat.think = argument
    elif argument in REASONING:
        chat.show_reasoning = argument == "show"
    else:
        raise ConfigError(f"/think takes one of {', '.join((*THINK, *REASONING))}")
    note(f"think {argument}")


def _path(argument: str) -> Path:
    return Path(argument).expanduser()


def _turns(chat: "Chat") -> str:
    return counted(chat.conversation.num_turns, "turn")


TABLE: tuple[SlashCommand["Chat"], ...] = (
    SlashCommand("help", "", "this list", _help, aliases=("h", "?")),
    SlashCommand("exit", "", "leave", _exit, aliases=("quit", "q", "bye")),
    SlashCommand("clear", "", "begin a new conversation", _clear),
    SlashCommand("regen", "", "answer the last message again", _regen),
    SlashCommand("undo", "", "drop the last exchange, or a file just read", _undo),
    SlashCommand("forget", "[N]", "drop the oldest exchange, or N, to make room", _forget),
    SlashCommand("system", "[TEXT]", "set the system prompt, or remove it", _system),
    SlashCommand(
        "set", "[NAME=VALUE]", "set a parameter ('default': reset), or list", _set, SET_CHOICES
    ),
    SlashCommand("show", "", "the parameters in force", _show),
    SlashCommand("save", "[FILE]", "save the conversation", _save, takes_path=True),
    SlashCommand("load", "FILE", "go on with a saved conversation", _load, takes_path=True),
    SlashCommand("read", "FILE", "put a text file before the next message", _read, takes_path=True),
    SlashCommand("stats", "", "tokens and times so far", _stats),
    SlashCommand("experts", "", "which experts were used", _experts),
    SlashCommand("think", "MODE", "auto, on, off; show or hide it", _think, (*THINK, *REASONING)),
)

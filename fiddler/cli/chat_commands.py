"""The slash commands of the chat as data: one table gives parsing, completion and help."""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from fiddler.cli.params_edit import SETTABLE
from fiddler.errors import ConfigError, nearest
from fiddler.wrapping import wrapped

C = TypeVar("C")

# "/etc/passwd is a file" is a message: a command is one lower-case word.
COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?\s*", re.DOTALL)
TRIPLE = '"""'


@dataclass(frozen=True, slots=True)
class SlashCommand(Generic[C]):
    """One command; ``run`` gets the chat and what stands behind the name.

    ``choices`` complete the argument; ``takes_path`` completes file names instead.
    """

    name: str
    argument: str
    help: str
    run: Callable[[C, str], None]
    choices: tuple[str, ...] = ()
    takes_path: bool = False
    aliases: tuple[str, ...] = ()  # found, but neither listed nor completed

    @property
    def usage(self) -> str:
        """``/name ARGUMENT``."""
        return f"/{self.name} {self.argument}".rstrip()


def parse_command(text: str) -> tuple[str, str] | None:
    """Name and argument if ``text`` is a command, None if it is a message."""
    match = COMMAND.fullmatch(text)
    return (match[1], unquote((match[2] or "").strip())) if match else None


def find_command(name: str, table: Iterable[SlashCommand[C]]) -> SlashCommand[C]:
    """The command called ``name``; :class:`ConfigError` offers the nearest."""
    by_name = {name: command for command in table for name in (command.name, *command.aliases)}
    if name not in by_name:
        close = nearest(name, by_name).replace("'", "").replace("mean ", "mean /")
        raise ConfigError(
            f"there is no command /{name}{close}",
            hint="/help lists them; begin with a space to send such a line to the model",
        )
    return by_name[name]


def help_lines(table: Iterable[SlashCommand[C]], columns: int = sys.maxsize) -> list[str]:
    """One line for each command, or in a narrow terminal as many as it needs, in columns."""
    rows = [(command.usage, command.help) for command in table]
    width = max(len(usage) for usage, _ in rows)
    labelled = ((f"{usage:<{width}}  ", text) for usage, text in rows)
    return [line for label, text in labelled for line in wrapped(label, text, columns)]


def completions(text: str, table: Iterable[SlashCommand[C]]) -> list[tuple[str, int]]:
    """(word, how many characters it replaces) for what may come next after ``text``."""
    name, space, argument = text.partition(" ")
    if not text.startswith("/"):
        return []
    if not space:
        return [(f"/{c.name}", len(name)) for c in table if f"/{c.name}".startswith(name)]
    choices = next((c.choices for c in table if f"/{c.name}" == name), ())
    return [(word, len(argument)) for word in choices if word.startswith(argument)]


SET_CHOICES = tuple(f"{name}=" for name in SETTABLE)


# --- several lines in one message ---


def is_unfinished(text: str) -> bool:
    '''Whether ``text`` opens ``"""`` and does not close it yet.'''
    body = text.lstrip()
    head = COMMAND.fullmatch(body)
    body = (head[2] or "") if head else body
    return body.startswith(TRIPLE) and not _closed(body)


def unquote(text: str) -> str:
    '''Drop ``"""`` around ``text``, if there.'''
    bare = text.strip()
    if not (bare.startswith(TRIPLE) and _closed(bare)):
        return text
    return bare[len(TRIPLE) : -len(TRIPLE)].strip("\n")


def _closed(text: str) -> bool:
    return len(text.rstrip()) >= 2 * len(TRIPLE) and text.rstrip().endswith(TRIPLE)


def turns(lines: Iterable[str]) -> Iterable[str]:
    '''Cut piped input into turns: a line each, or the lines between two ``"""``.'''
    pending = ""
    for line in lines:
        pending += line
        if not is_unfinished(pending):
            yield pending.rstrip("\n")
            pending = ""
    if pending:
        yield pending.rstrip("\n")

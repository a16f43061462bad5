"""The prompt of a one-shot command: an argument, standard input, or both."""

import select
import sys

import click

from fiddler.cli.console import note, valid_unicode
from fiddler.errors import PromptError

FROM_PIPE = "-"
PATIENCE_S = 2.0


def full_prompt(argument: str | None = None) -> str:
    """``argument`` with what is piped in behind it; ``-`` or nothing is the pipe alone."""
    if argument in (None, FROM_PIPE):
        if argument is None and not _is_piped():
            raise click.UsageError("give a PROMPT, or pipe one in")
        text = _read_pipe()
    else:
        piped = _read_pipe() if _is_piped() else ""
        text = "\n\n".join(part for part in (argument, piped) if part)
    if not text.strip():
        raise PromptError("the prompt is empty", hint="fiddler generate 'Why is the sky blue?'")
    return valid_unicode(text)


def _is_piped() -> bool:
    """Whether standard input is there (it may be closed) and is no terminal."""
    return sys.stdin is not None and not sys.stdin.isatty()


def _read_pipe() -> str:
    """All of standard input without its last newline; says so if that keeps us waiting."""
    if sys.stdin is None:
        return ""
    if _is_piped() and not _has_begun():
        note("waiting for the end of standard input ( </dev/null if none is meant)")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError("standard input is not text in UTF-8") from error


def _has_begun() -> bool:
    try:
        return bool(select.select([sys.stdin], [], [], PATIENCE_S)[0])
    except (ValueError, OSError):  # no real file, as in tests
        return True

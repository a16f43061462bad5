"""Standard error and standard output as the commands use them: colour only where it is wanted."""

import os
import re
import shutil
import sys
from typing import IO, TYPE_CHECKING, Any

import click

from fiddler.wrapping import fitted

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# C0 and C1 control characters but tab and newline: a model's text must not drive the terminal.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def has_colour(stream: IO[str]) -> bool:
    """Whether ``stream`` is a terminal and the user has not set ``NO_COLOR``."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def styled(text: str, **style: Any) -> str:
    """``text`` in click's style for standard error, or plain where there is no colour."""
    return click.style(text, **style) if has_colour(sys.stderr) else text


def note(text: str) -> None:
    """Write one dim line to standard error, or on a terminal as many as it needs."""
    for line in fitted(text, error_width()):
        click.echo(styled(line, dim=True), err=True)


def error_width() -> int:
    """Columns for a line on standard error: the terminal's, or no limit where there is none."""
    return _width(sys.stderr)


def output_width() -> int:
    """As :func:`error_width`, for standard output."""
    return _width(sys.stdout)


def _width(stream: IO[str]) -> int:
    return shutil.get_terminal_size().columns if stream.isatty() else sys.maxsize


def echo(text: str) -> None:
    """Write ``text`` to standard output, on a terminal in lines of its width."""
    for line in fitted(text, output_width()):
        click.echo(line)


def printable(text: str) -> str:
    """``text`` without control characters other than tab and newline."""
    return CONTROLS.sub("", text)


def valid_unicode(text: str) -> str:
    """``text`` with undecodable bytes (lone surrogates) replaced, so that it can be encoded."""
    return text.encode("utf-8", "replace").decode("utf-8")


def output_console() -> "Console":
    """A rich console on standard output that leaves words as they are."""
    from rich.console import Console
    from rich.theme import Theme

    theme = Theme({"markdown.code": "cyan"})  # rich's own has a black background
    return Console(highlight=False, markup=False, emoji=False, theme=theme)


def print_trimmed(console: "Console", what: "RenderableType", style: str | None = None) -> None:
    """Print a text or a table without the blanks with which rich fills up its lines."""
    from rich.segment import Segment, Segments

    as_style = console.get_style(style) if style else None
    for line in console.render_lines(what, style=as_style, pad=False):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), *line[-1][1:])
        console.print(Segments([*line, Segment.line()]), crop=False, end="")

"""``--html FILE``: checked before the work begins, written when it is done."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from fiddler.cli.console import note
from fiddler.cli.profile_outputs import check_outputs, page_output
from fiddler.errors import ConfigError
from offload.whole_file import write_whole


def html_option(help: str) -> Callable[..., Any]:
    """The option; ``help`` says what is written."""
    return click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help=help)


def check_page(path: Path | None, taken: Mapping[Path, str] | None = None) -> None:
    """Raise :class:`ConfigError` if ``path`` could not be written, or is another's file.

    ``taken`` are the command's other files and say what each is, as in "is the profile".
    """
    if path is not None:
        check_outputs(taken or {}, [page_output(path)])


def write_page(path: Path, text: str) -> None:
    """Write a page and say so; raises :class:`ConfigError` where it cannot be."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    note(f"wrote {path}")

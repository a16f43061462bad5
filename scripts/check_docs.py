"""Keeps the generated parts of README.md true: ``--help`` texts and the table of engine options.

A part stands between ``<!-- help:generate -->`` (or ``help:fiddler``, or ``engine-options``) and
``<!-- end -->``. Without arguments a part that is out of date fails with a diff.

    python -m scripts.check_docs [--write]
"""

import difflib
import re
import sys
from dataclasses import fields
from pathlib import Path

import click
from click.testing import CliRunner

from fiddler.cli import COMMANDS, cli
from fiddler.cli.options import ENGINE_OPTIONS
from fiddler.config import EngineConfig

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- (help:[\w-]+|engine-options) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
BEGIN = re.compile(r"<!-- (help:|engine-options)")
WIDTH = 88


def generated(name: str) -> str:
    """The text of the part ``name``; :class:`click.UsageError` if there is no such part."""
    if name == "engine-options":
        return options_table()
    command = name.removeprefix("help:")
    if command not in ("fiddler", *COMMANDS):
        raise click.UsageError(f"the marker {name!r} names no command")
    return f"```text\n{help_text(command)}\n```\n"


def help_text(name: str) -> str:
    """What ``fiddler NAME --help`` prints, or ``fiddler --help`` for ``fiddler``."""
    arguments = ["--help"] if name == "fiddler" else [name, "--help"]
    result = CliRunner().invoke(
        cli, arguments, prog_name="fiddler", terminal_width=WIDTH, max_content_width=WIDTH
    )
    assert result.exit_code == 0, result.output
    return result.stdout.rstrip()


def options_table() -> str:
    """Flags of the command line beside the names in ``LLM(...)``, as a Markdown table."""
    defaults = {field.name: field.default for field in fields(EngineConfig)}
    rows = ["| flag | in `LLM(...)` | default | meaning |", "|---|---|---|---|"]
    for option in ENGINE_OPTIONS:
        metavar = f" {option.metavar}" if option.metavar else ""
        default = defaults[option.field]
        shown = "chosen" if default is None else f"`{default!r}`"
        meaning = option.help.replace("|", "\\|")
        rows.append(f"| `{option.flag}{metavar}` | `{option.field}` | {shown} | {meaning} |")
    return "\n".join(rows) + "\n"


def updated(text: str) -> str:
    """``text`` with every marked part as it should be; a marker without an end is an error."""
    if len(BEGIN.findall(text)) != len(BLOCK.findall(text)):
        raise click.UsageError("a marker has no <!-- end -->, or stands inside another part")
    return BLOCK.sub(lambda part: part[1] + generated(part[2]) + part[4], text)


def difference(before: str, after: str, name: str) -> str:
    """A unified diff, empty if nothing changed."""
    lines = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, name, f"{name} (generated)"))


@click.command()
@click.option("--write", is_flag=True, help="Bring the file up to date.")
@click.argument("path", type=click.Path(exists=True, path_type=Path), default=README)
def main(write: bool, path: Path) -> None:
    """Check the generated parts of README.md, or of PATH."""
    before = path.read_text(encoding="utf-8")
    after = updated(before)
    if write:
        path.write_text(after, encoding="utf-8")
    elif before != after:
        click.echo(difference(before, after, path.name), nl=False)
        click.echo(f"{path.name} is out of date: python -m scripts.check_docs --write", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The ``fiddler`` command. Only click is imported here; a command's module loads when it runs."""

import gc
import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from fiddler._version import __version__

# Name -> one line of help, written here so that ``fiddler --help`` imports no command.
# Each command is ``fiddler.cli.<name>:command``.
COMMANDS = {
    "chat": "Talk with a model.",
    "generate": "Answer one prompt.",
    "pull": "Download a model.",
    "plan": "Show what would run where, without loading the model.",
    "profile": "Count which experts a text uses, for better placement.",
    "simulate": "Play placement policies on recorded or drawn routes.",
    "quantize": "Make a model's experts smaller: 4 or 8 bits a weight.",
    "bench": "Measure speed beside what the machine could give.",
    "eval": "Measure how well a model predicts a text, and against a reference.",
    "calibrate": "Measure this machine for plans and predictions.",
    "doctor": "Check this machine.",
}
ONE_DASH = re.compile(r"-\w{2,}")  # an option of llama.cpp, as -ngl, or one with a value, as -n5


class LazyGroup(click.Group):
    """Imports a command when it is looked up, and turns errors into sentences."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"fiddler.cli.{cmd_name}").command
        assert isinstance(command, click.Command), cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            from fiddler.cli import other_names

            if name in other_names.COMMANDS:
                raise click.UsageError(f"No such command {name!r}: {other_names.COMMANDS[name]}.")
            raise click.exceptions.NoSuchCommand(name, possibilities=COMMANDS, ctx=ctx)
        found_name, command, rest = super().resolve_command(ctx, args)
        if command is not None and any(ONE_DASH.match(word) for word in rest):
            from fiddler.cli.other_names import check_words

            check_words(click.Context(command, parent=ctx, info_name=found_name), rest)
        return found_name, command, rest

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        from fiddler.cli.errors import as_sentences

        words = [*ctx.args]
        with as_sentences(debug=bool(ctx.params["debug"])):
            try:
                return super().invoke(ctx)
            except click.NoSuchOption as error:
                from fiddler.cli.other_names import known_option

                raise known_option(error, words) or error from None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fiddler", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Run Mixture-of-Experts models that are bigger than the GPU."""


def main() -> None:
    """Run the command line and exit with its code: 0, 1 an error, 2 misuse, 130 interrupted."""
    _open_outputs()
    try:
        cli.main(prog_name="fiddler")
    finally:
        gc.freeze()  # else the interpreter looks for garbage in what it is about to leave: 0.6 s


def _open_outputs() -> None:
    """What is written to a closed stream, as a daemon may have them, goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  for the whole run

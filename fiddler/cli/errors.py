"""Errors as people read them: one sentence, one hint, an exit code; tracebacks with ``--debug``."""

import contextlib
import errno
import sys
import warnings
from collections.abc import Iterator
from typing import IO, Any

import click

from fiddler.cli.console import error_width, styled
from fiddler.errors import FiddlerError
from fiddler.wrapping import wrapped

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
# cpu_kernels.isa.VARIABLE: that module cannot be imported if the variable asks for the impossible
ISA_VARIABLE = "FIDDLER_ISA"


class Sentence(click.ClickException):
    """An error on its way to standard error; exit code 1."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def show(self, file: IO[Any] | None = None) -> None:
        print_error(self.message, self.hint)


def print_error(message: str, hint: str = "") -> None:
    """Write ``error: message`` and, if there is one, ``hint: hint`` to standard error."""
    click.echo(_labelled("error:", message, fg="red", bold=True), err=True)
    if hint:
        click.echo(_labelled("hint:", hint, fg="cyan"), err=True)


def _labelled(label: str, text: str, **style: Any) -> str:
    """On a terminal in lines of its width, broken at blanks; else in one."""
    width = error_width()
    lines = wrapped(f"{label} ", text, width) if width < sys.maxsize else [f"{label} {text}"]
    first, *more = lines
    return "\n".join([styled(label, **style) + first.removeprefix(label), *more])


@contextlib.contextmanager
def as_sentences(*, debug: bool) -> Iterator[None]:
    """Turn what escapes a command into a :class:`Sentence` or an exit code.

    click's own errors and a closed pipe pass through: click ends both quietly. With ``debug``
    every other error passes too, so Python prints its traceback. Warnings are sentences as well.
    """
    warnings.formatwarning = _warning
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except (click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        if debug or is_closed_pipe(error):
            raise
        raise sentence(error) from None


def _warning(message: Warning | str, *where: object, **more: object) -> str:
    """As a person reads it: not where in the sources it was given."""
    return _labelled("warning:", str(message), fg="yellow", bold=True) + "\n"


def is_closed_pipe(error: Exception) -> bool:
    """Whether whoever read our output has gone."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE


def sentence(error: Exception) -> Sentence:
    """Say in one sentence what went wrong."""
    if isinstance(error, FiddlerError):
        return Sentence(error.message, error.hint)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return Sentence(f"the Python package {package!r} is missing", f"pip install {package}")
    if isinstance(error, OSError) and error.strerror:
        subject = f"{error.filename}: " if error.filename else ""
        return Sentence(f"{subject}{error.strerror.lower()}", _debug_hint())
    if isinstance(error, MemoryError):
        return Sentence("out of memory", "lower --context or --ram-gb, or close other programs")
    said = str(error).partition("\n")[0]
    if failed := _of_gpu(type(error).__name__, said):
        return failed
    if isinstance(error, ValueError) and ISA_VARIABLE in said:
        return Sentence(said, f"unset {ISA_VARIABLE}: the best path is then taken")
    kind = type(error).__name__
    return Sentence(f"unexpected {kind}: {said}" if said else f"unexpected {kind}", _debug_hint())


def _of_gpu(kind: str, said: str) -> Sentence | None:
    """Of torch's errors of a device, which are known by name: torch need not have been imported."""
    if kind == "OutOfMemoryError":
        return Sentence(
            "the GPU has no memory left: something else uses it too",
            "nvidia-smi shows what; end that, or use a smaller --vram-gb",
        )
    if kind == "AcceleratorError" or said.startswith("CUDA error"):
        return Sentence(
            f"the GPU failed: {said.removeprefix('CUDA error: ')}",
            "start again; if nvidia-smi does not show the GPU any more, restart the machine, and "
            "until then --device cpu goes on without it",
        )
    return None


def _debug_hint() -> str:
    """How to repeat this command with a traceback."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "COMMAND")
    return f"for the details run it again with --debug: fiddler --debug {command} ..."

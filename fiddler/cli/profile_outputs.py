"""What commands may write over: files of the kind that they write, never what they read."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fiddler.cli.written_file import check_apart, check_folder, overwriting
from fiddler.errors import ConfigError

IMAGE_MARKS = {".png": b"\x89PNG\r\n", ".svg": b"<svg"}
TRACE_MARK = b"about.npy"  # the first file in the archive
PAGE_MARK = b'<meta name="generator" content="fiddler'
MARK_WITHIN = 4096  # bytes; matplotlib's own SVG has a comment of 200 before its first element


@dataclass(frozen=True, slots=True)
class Output:
    """A file to write: ``kind`` as in "is not a profile", ``is_ours`` whether it is one.

    ``is_named``: by the user, who then wants what is there replaced.
    """

    option: str
    path: Path
    kind: str
    is_ours: Callable[[Path], bool]
    is_named: bool = True


def profile_output(path: Path, *, is_named: bool = True) -> Output:
    """Where the profile goes."""
    return Output("-o", path, "profile", _is_profile, is_named)


def picture_output(path: Path) -> Output:
    """A PNG or an SVG, by its name."""
    mark = IMAGE_MARKS[path.suffix]
    return Output("--picture", path, f"{path.suffix} picture", lambda p: mark in _beginning(p))


def trace_output(path: Path) -> Output:
    """A routing trace."""
    return Output("--trace", path, "routing trace", lambda p: TRACE_MARK in _beginning(p))


def page_output(path: Path) -> Output:
    """A page of fiddler's."""
    return Output("--html", path, "page of fiddler", lambda p: PAGE_MARK in _beginning(p))


def check_outputs(inputs: Mapping[Path, str], outputs: Sequence[Output]) -> None:
    """Raise :class:`ConfigError` if writing would fail, or destroy an input or another's file.

    ``inputs`` say what each is, as in "is the corpus".
    """
    taken = dict(inputs)
    for output in outputs:
        check_apart(output.option, output.path, taken)
        check_folder(output.option, output.path)
        if _holds_something(output.path) and not output.is_ours(output.path):
            why = f"exists and is not a {output.kind}"
            raise overwriting(output.option, output.path, why)
        if _holds_something(output.path) and not output.is_named:
            raise ConfigError(
                f"there is a {output.kind} in {output.path} already",
                hint=f"replace it by {output.option} {output.path}, or name another file",
            )
        _check_draft(output)
        taken[output.path] = f"is where the {output.kind} goes"


def _check_draft(output: Output) -> None:
    """Of what is replaced as a whole, a draft is made beside it: so a file is, that has no name.

    Modes alone say nothing of root, of /proc, or of a file system mounted read-only.
    """
    try:
        tempfile.TemporaryFile(dir=output.path.parent).close()
    except OSError as error:
        raise ConfigError(
            f"{output.option} {output.path} cannot be written there: {error.strerror}",
            hint="name a file in a writable folder",
        ) from error


def _holds_something(path: Path) -> bool:
    """An empty file, as ``mktemp`` makes, has nothing to lose; a device is not replaced."""
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


def _is_profile(path: Path) -> bool:
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"corpus_sha256", "num_tokens"} <= record.keys()


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MARK_WITHIN)
    except OSError:
        return b""

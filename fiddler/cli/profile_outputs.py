"""What ``fiddler profile`` may write over: profiles and pictures, never what it reads."""

import json
from collections.abc import Iterable
from pathlib import Path

from fiddler.errors import ConfigError

IMAGE_MARKS = {".png": b"\x89PNG\r\n", ".svg": b"<svg"}
MARK_WITHIN = 4096  # bytes; matplotlib's own SVG has a comment of 200 before its first element


def check_outputs(inputs: Iterable[Path], output: Path, picture: Path | None) -> None:
    """Raise :class:`ConfigError` if writing would destroy an input or a file of another kind."""
    taken = dict.fromkeys(inputs, "is the corpus")
    _check_apart("-o", output, taken)
    if _holds_something(output) and not _is_profile(output):
        raise _refusal("-o", output, "exists and is not a profile")
    if picture is not None:
        _check_apart("--picture", picture, taken | {output: "is where the profile goes"})
        if _holds_something(picture) and not _is_picture(picture):
            raise _refusal("--picture", picture, f"exists and is not a {picture.suffix} picture")


def _check_apart(option: str, path: Path, taken: dict[Path, str]) -> None:
    for other, why in taken.items():
        if _is_same_file(path, other):
            raise _refusal(option, path, why)


def _is_same_file(one: Path, other: Path) -> bool:
    """Also by a link or another spelling; both may not exist yet."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _holds_something(path: Path) -> bool:
    """An empty file, as ``mktemp`` makes, has nothing to lose; a device is not replaced."""
    return path.exists() and not (path.is_file() and path.stat().st_size == 0)


def _is_profile(path: Path) -> bool:
    try:
        record = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and {"corpus_sha256", "num_tokens"} <= record.keys()


def _is_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            begin = file.read(MARK_WITHIN)
    except OSError:
        return False
    return IMAGE_MARKS[path.suffix] in begin


def _refusal(option: str, path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{option} {path} {why}: it would be overwritten", hint="name another file to write"
    )

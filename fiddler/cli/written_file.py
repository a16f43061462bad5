"""A file that is written when the work is done: checked before it begins."""

from collections.abc import Mapping
from pathlib import Path

from fiddler.errors import ConfigError


def check_file(option: str, path: Path) -> None:
    """Raise ConfigError if ``path`` cannot be written, before time is spent on its content.

    By opening it: modes say nothing of root, of /proc, or of a file system mounted read-only.
    """
    check_folder(option, path)
    is_new = not path.exists()
    if not is_new and not path.is_file():
        return  # a pipe's or a device's reader would see it opened
    try:
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def check_apart(option: str, path: Path, taken: Mapping[Path, str]) -> None:
    """Raise ConfigError if ``path`` is one of ``taken``, which say what each is."""
    for other, why in taken.items():
        if _is_same_file(path, other):
            raise overwriting(option, path, why)


def overwriting(option: str, path: Path, why: str) -> ConfigError:
    """The refusal of a ``path`` that is something else, as in "is the corpus"."""
    return ConfigError(
        f"{option} {path} {why}: it would be overwritten", hint="name another file to write"
    )


def check_folder(option: str, path: Path) -> None:
    """Raise ConfigError if ``path`` lies in no folder, or is one."""
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(
            f"{option} {path} cannot be written there", hint="name a file in a folder that exists"
        )


def write_file(path: Path, text: str) -> None:
    """Write ``text``; raises ConfigError where it cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written: {error.strerror}", hint="name a file in a writable folder"
    )


def _is_same_file(one: Path, other: Path) -> bool:
    """Also by a link or another spelling; both may not exist yet."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()

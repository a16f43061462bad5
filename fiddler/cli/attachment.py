"""Text files that go into a prompt."""

import stat
from pathlib import Path

from fiddler.errors import ConfigError

MAX_BYTES = 4 << 20  # a million tokens and more: beyond any context


def read_text_file(path: Path) -> str:
    """The UTF-8 text of ``path``; :class:`ConfigError` if it is missing, binary or too large."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a device or a pipe could be endless
            raise ConfigError(f"{path} is no file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
    if b"\0" in content:
        raise ConfigError(f"{path} is binary, not text")
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text") from error

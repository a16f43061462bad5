"""Where a model goes: which folders may be replaced, and how an old one is removed."""

import os
import re
import shutil
from pathlib import Path

from fiddler.errors import CheckpointError, QuantizeError
from fiddler.models.quantized import QUANT_METHOD, quantization_of
from fiddler.text.model_files import read_json_object

MOUNTS = Path("/proc/self/mountinfo")


def place_of(output: Path) -> Path:
    """The folder that will be renamed at the end, links followed.

    :class:`QuantizeError` for one that cannot be.
    """
    folder = Path(os.path.realpath(output))
    if folder.is_symlink():
        raise QuantizeError(f"{output} is a link that ends nowhere", hint="choose another -o")
    if os.path.ismount(folder) or os.fsencode(folder) in _mounts():
        raise QuantizeError(
            f"{folder} is a mount point, whose name no other folder can take",
            hint=f"choose a folder in it: -o {folder / 'model'}",
        )
    return folder


def _mounts() -> set[bytes]:
    """Also those of folders of the same disk, as containers have them; os.path has no eye for such.

    Blanks and backslashes are written as octal numbers.
    """
    if not MOUNTS.exists():
        return set()
    points = (row.split()[4] for row in MOUNTS.read_bytes().splitlines())
    return {re.sub(rb"\\(\d{3})", lambda m: bytes([int(m[1], 8)]), point) for point in points}


def beside(folder: Path, what: str) -> Path:
    """A folder of the same disk, so that one can take the other's name."""
    return folder.with_name(f"{folder.name}.{what}")


def check_replaceable(folder: Path) -> None:
    """Only what an earlier run made may be replaced, or nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if _is_own_model(folder):
        return
    raise QuantizeError(
        f"{folder} exists and is no model that fiddler quantised", hint="choose another -o"
    )


def remove_model(folder: Path) -> None:
    """Remove what may be replaced, ``config.json`` last: until it goes a later run may do this."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "config.json":
            path.unlink()
    shutil.rmtree(folder)


def _is_own_model(folder: Path) -> bool:
    try:
        scheme = quantization_of(read_json_object(folder / "config.json"))
    except CheckpointError:
        return False
    return scheme.get("quant_method") == QUANT_METHOD

"""One run at a time writes into a folder: the system keeps the lock, and frees it when we die."""

import fcntl
import os
from pathlib import Path
from typing import IO

from fiddler.errors import QuantizeError

LOCK = "quantize.lock"


def hold(folder: Path) -> IO[str]:
    """Keep others out of ``folder`` until the file is closed; QuantizeError if one is there.

    Where the disk knows no locks, as some of a network, nobody is kept out.
    """
    path = folder / LOCK
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_ours = False
    except OSError:
        is_ours = True
    else:
        is_ours = _is_at(lock, path)  # not of a folder that has just got its name
    if is_ours:
        return lock
    lock.close()
    raise QuantizeError(
        f"another run is writing {folder}", hint="wait until it has ended, or choose another -o"
    )


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False

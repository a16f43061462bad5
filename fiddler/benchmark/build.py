"""Which sources are running."""

import subprocess
from pathlib import Path

from fiddler._version import __version__

ROOT = Path(__file__).parents[2]


def build_commit() -> str:
    """The short commit of a checkout, or else the version.

    Only a checkout of fiddler itself counts: an installed copy may lie inside another repository.
    """
    if not (ROOT / ".git").exists():
        return __version__
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return __version__

"""Bytes and counts as people read them, and the nearest GiB figure that is enough."""

import math
import sys

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MOST_GIB = sys.float_info.max / GIB  # more of them are infinitely many bytes


def size_text(size_bytes: int) -> str:
    """``"22.4 GiB"``, ``"704 MiB"``, ``"12 KiB"`` or ``"9 B"``; three digits at most."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            value = size_bytes / unit
            return f"{value:.{0 if value >= 100 else 1}f} {name}"
    return f"{size_bytes} B"


def counted(number: int, thing: str) -> str:
    """``"1 worker"``, ``"2 workers"``."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def gib_at_least(size_bytes: int) -> str:
    """Return the smallest short GiB figure that is not below ``size_bytes``, for a command line."""
    decimals = 1 if size_bytes >= GIB else 3
    scale: int = 10**decimals
    return f"{math.ceil(size_bytes * scale / GIB) / scale:.{decimals}f}"


def gib_at_most(size_bytes: int) -> str:
    """Return the largest figure of one decimal that is not above ``size_bytes``."""
    return f"{math.floor(size_bytes * 10 / GIB) / 10:.1f}"


def gib_to_bytes(gib: float) -> int:
    """GiB as given on the command line to bytes, rounded down."""
    return int(gib * GIB)

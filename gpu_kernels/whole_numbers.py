"""Grids and tile sizes in whole numbers, for launchers.

Triton has the same, but as functions that kernels may call too: each call on the host takes 1.5 us,
and the launches of a layer of a prompt made some forty.
"""


def cdiv(size: int, part: int) -> int:
    """How many ``part`` cover ``size``."""
    return -(-size // part)


def next_power_of_2(size: int) -> int:
    """The least power of two that is no less than ``size``, which is at least 1."""
    return 1 << (size - 1).bit_length()

"""Random draws from a table, by position: the generator behind dummy weights.

SplitMix64 of a counter gives 64 bits for four numbers, so any block can be filled alone.
"""

from typing import Any

import numba
import numpy as np

LEVELS = 4096  # 8 KB of bf16: stays in the first-level cache
LANES = 4  # numbers per 64 bits: 16 bits each, of which the upper 12 choose the level


@numba.njit(nogil=True)
def fill_from_table(out: Any, table: Any, key: np.uint64, start: int) -> None:
    """Fill the flat ``out`` with entries of ``table``; ``out[0]`` is number ``start`` of ``key``.

    ``start`` is a multiple of ``LANES`` and ``table`` has ``LEVELS`` entries of ``out``'s dtype.
    """
    mask = np.uint64(LEVELS - 1)
    groups = out.size // LANES
    for group in range(groups):  # lanes written out: 0.87 G numbers/s a core, a loop 0.40
        bits = _random_bits(key, start // LANES + group)
        out[LANES * group] = table[(bits >> np.uint64(4)) & mask]
        out[LANES * group + 1] = table[(bits >> np.uint64(20)) & mask]
        out[LANES * group + 2] = table[(bits >> np.uint64(36)) & mask]
        out[LANES * group + 3] = table[bits >> np.uint64(52)]
    bits = _random_bits(key, start // LANES + groups)
    for lane in range(out.size - LANES * groups):
        out[LANES * groups + lane] = table[(bits >> np.uint64(16 * lane + 4)) & mask]


@numba.njit(inline="always")
def _random_bits(key: np.uint64, counter: int) -> np.uint64:
    bits = key + np.uint64(counter + 1) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

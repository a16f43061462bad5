"""Each weight to the nearest code of its group's best grid; no weight knows of another column's.

N rows, K columns, G groups of a row, L columns of a group.
"""

import numpy as np

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import Quantised
from cpu_kernels.weight_kind import WeightKind
from fiddler.rounding.grid import SHRINKS, Grid, find_grid, round_to

CHUNK = 1 << 16  # weights rounded at a time: with their copies they stay in a core's cache


def round_matrix(
    w_NK: F32,
    kind: WeightKind,
    importance_K: F32 | None = None,
    shrinks: tuple[float, ...] = SHRINKS,
    *,
    middle: int | None = None,
) -> Quantised:
    """Codes of finite weights; K a multiple of the group. ``middle`` and ValueError: `find_grid`.

    ``importance_K``: how much an error in column k counts, such as the mean square of its input.
    """
    num_rows, cols = w_NK.shape
    assert kind.is_rounded and cols % kind.group == 0, (kind, w_NK.shape)
    importance_GL = None if importance_K is None else importance_K.reshape(-1, kind.group)
    codes_NK = np.empty(w_NK.shape, np.uint8)
    grids: list[Grid] = []
    rows = max(1, CHUNK // cols)
    for first in range(0, num_rows, rows):
        w_NGL = w_NK[first : first + rows].reshape(-1, cols // kind.group, kind.group)
        grid = find_grid(w_NGL, kind, importance_GL, shrinks, middle=middle)
        codes_NGL = round_to(w_NGL, grid, kind, np.empty_like(w_NGL))
        codes_NK[first : first + rows] = codes_NGL.reshape(-1, cols)
        grids.append(grid)
    return quantised(codes_NK, grids, kind, axis=0)


def quantised(codes_NK: np.ndarray, grids: list[Grid], kind: WeightKind, *, axis: int) -> Quantised:
    """Codes with the grids of their parts, which follow each other along rows (0) or groups (1)."""
    scales_NG = np.concatenate([grid.scales_NG for grid in grids], axis=axis)
    if not kind.has_zeros:
        return Quantised(codes_NK, scales_NG, None)
    zeros_NG = np.concatenate([grid.zeros_NG for grid in grids], axis=axis)
    return Quantised(codes_NK, scales_NG, zeros_NG.astype(np.uint8))

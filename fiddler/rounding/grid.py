"""Scales and zero points of groups of weights: the range that rounds with the least error.

Wide ranges waste codes on a few extreme weights. So the extremes are shrunk step by step, what lies
beyond them is clipped, and each group keeps the range with the least weighted squared error.

N rows, G groups of a row, L columns of a group.
"""

from typing import NamedTuple

import numpy as np

from cpu_kernels.bf16 import F32, F64
from cpu_kernels.packed_layout import decode_scales, encode_scales
from cpu_kernels.weight_kind import Scales, WeightKind

# Relative error of normal weights, w4g128 with zero points: 0.101 at 1.0, 0.095 with all of these
# to choose from; int8 keeps 1.0. A matrix of 3 M weights takes 0.33 s on one core.
SHRINKS = tuple(1 - 0.025 * step for step in range(15))
# By bits, where time counts. int4, groups of 128, normal weights: 0.1006 with the whole range,
# 0.0965 with these two in twice the time, 0.0951 with all of the above in eleven times.
QUICK_SHRINKS = {4: (1.0, 0.9), 8: (1.0,)}


class Grid(NamedTuple):
    """What a code of a group stands for: ``scale * (code - zero)``.

    ``scales_NG`` are numbers that the kind's 16-bit type has exactly; of either sign, and 0 where
    all weights are. ``zeros_NG`` are whole numbers; a symmetric kind has the middle everywhere.
    """

    scales_NG: F32
    zeros_NG: F32


def find_grid(
    w_NGL: F32,
    kind: WeightKind,
    importance_GL: F32 | None = None,
    shrinks: tuple[float, ...] = SHRINKS,
    *,
    middle: int | None = None,
) -> Grid:
    """The best grid of each group among the ranges shrunk by ``shrinks``, the first of equals.

    ``middle`` is a zero point that all groups have to have, of a kind with zero points.

    ``importance_GL`` weighs a column's squared errors, None: all alike. ValueError for weights too
    large for scales of the kind's type. With the one shrink 1.0 this is rounding to nearest.
    """
    top_NG, bottom_NG = w_NGL.max(axis=2).astype(np.float64), w_NGL.min(axis=2).astype(np.float64)
    best = range_grid(top_NG * shrinks[0], bottom_NG * shrinks[0], kind, middle)
    if len(shrinks) == 1:
        return best
    room = np.empty_like(w_NGL)
    least_NG = _error(w_NGL, best, kind, importance_GL, room)
    for shrink in shrinks[1:]:
        grid = range_grid(top_NG * shrink, bottom_NG * shrink, kind, middle)
        error_NG = _error(w_NGL, grid, kind, importance_GL, room)
        is_better_NG = error_NG < least_NG
        np.copyto(best.scales_NG, grid.scales_NG, where=is_better_NG)
        np.copyto(best.zeros_NG, grid.zeros_NG, where=is_better_NG)
        np.minimum(least_NG, error_NG, out=least_NG)
    return best


def range_grid(top_NG: F64, bottom_NG: F64, kind: WeightKind, middle: int | None = None) -> Grid:
    """The grid that spreads the codes over [bottom, top] and 0.

    A symmetric kind gives the extreme of larger magnitude, of either sign, the code 0.
    """
    if middle is not None:
        ideal_NG = np.maximum(top_NG / (kind.max_code - middle), -bottom_NG / middle)
        scales_NG = _stored(np.maximum(ideal_NG, 0), kind.scales)
        return Grid(scales_NG, np.full(scales_NG.shape, middle, np.float32))
    if kind.has_zeros:
        top_NG, bottom_NG = np.maximum(top_NG, 0), np.minimum(bottom_NG, 0)
        scales_NG = _stored((top_NG - bottom_NG) / kind.max_code, kind.scales)
        return Grid(scales_NG, np.rint(-bottom_NG / steps(scales_NG)).astype(np.float32))
    size_NG = _stored(np.maximum(top_NG, -bottom_NG) / kind.middle, kind.scales)
    scales_NG = np.where((top_NG >= -bottom_NG) & (size_NG > 0), -size_NG, size_NG)
    return Grid(scales_NG, np.full(size_NG.shape, kind.middle, np.float32))


def steps(scales: F32) -> F32:
    """Divisors: a scale of 0, whose group holds zeros, divides by 1."""
    return np.where(scales == 0, np.float32(1), scales)


def round_to(w_NGL: F32, grid: Grid, kind: WeightKind, out: F32) -> F32:
    """The nearest codes, as floats in ``out``."""
    np.divide(w_NGL, steps(grid.scales_NG)[:, :, None], out=out)
    np.rint(out, out=out)
    out += grid.zeros_NG[:, :, None]
    np.maximum(out, 0, out=out)
    return np.minimum(out, kind.max_code, out=out)


def _error(w_NGL: F32, grid: Grid, kind: WeightKind, importance_GL: F32 | None, room: F32) -> F32:
    """Weighted squared error of each group [N, G]."""
    codes_NGL = round_to(w_NGL, grid, kind, room)
    codes_NGL -= grid.zeros_NG[:, :, None]
    codes_NGL *= grid.scales_NG[:, :, None]
    codes_NGL -= w_NGL
    if importance_GL is None:
        error_NG: F32 = np.einsum("ngl,ngl->ng", codes_NGL, codes_NGL)
    else:
        np.square(codes_NGL, out=codes_NGL)
        error_NG = np.einsum("ngl,gl->ng", codes_NGL, importance_GL)
    return error_NG


def _stored(ideal_NG: F64, scales: Scales) -> F32:
    """Non-negative scales rounded up to their 16-bit type, so that the extremes keep their codes.

    The nearest scale of a group of tiny weights could be 0: f16 has steps of 6e-8 below 6e-5.
    """
    bits_NG = encode_scales(ideal_NG, scales)
    bits_NG += decode_scales(bits_NG, scales) < ideal_NG
    stored_NG = decode_scales(bits_NG, scales)
    if not np.isfinite(stored_NG).all():
        raise ValueError(f"the weights are too large for {scales} scales: choose bf16 scales")
    return stored_NG

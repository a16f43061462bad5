"""GPTQ: columns are rounded one after the other, and later ones make up for the errors of earlier.

What is minimised is the error of the outputs on given inputs, ||(W - W') X||, which depends on the
inputs through H = sum x x^T alone. In the fixed order of the columns, with H^-1 = U^T U and U upper
triangular, an error e of column k is best repaired by adding -e * U[k, j] / U[k, k] to every later
column j. Within a group of columns that is done at once, for all later groups by one matrix product
when the group is done. Each group finds its grid when its turn comes, in its weights as they are
by then.

N rows, K columns, G groups, L columns of a group.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import Quantised
from cpu_kernels.weight_kind import WeightKind
from fiddler.rounding.grid import SHRINKS, Grid, find_grid, steps
from fiddler.rounding.matrix import quantised

# Added to the diagonal, as shares of its mean: the first with which H is positive in float64.
DAMPING = (0.01, 0.1, 1.0)


class Last(NamedTuple):
    """The last ``num_columns``, whole groups, of another kind; ``middle`` as in ``find_grid``."""

    num_columns: int
    kind: WeightKind
    middle: int | None


def gptq(
    w_NK: F32,
    hessian_KK: Tensor,
    kind: WeightKind,
    shrinks: tuple[float, ...] = SHRINKS,
    *,
    last: Last | None = None,
) -> Quantised:
    """Codes of finite weights for inputs with ``hessian_KK``, float32; K a multiple of the group.

    With ``last`` the last columns are of another kind, and zero points are given of all groups.

    ValueError as :func:`fiddler.rounding.grid.find_grid`, or if the Hessian holds NaN or Inf.
    """
    num_rows, cols = w_NK.shape
    assert kind.is_rounded and cols % kind.group == 0, (kind, w_NK.shape)
    repair_KK = repairs(hessian_KK)
    importance_K = hessian_KK.diagonal().numpy()
    w_KN = torch.from_numpy(np.ascontiguousarray(w_NK.T))  # changes as errors are repaired
    codes_KN = np.empty((cols, num_rows), np.uint8)
    grids: list[Grid] = []
    wide_from = cols if last is None else cols - last.num_columns
    for first in range(0, cols, kind.group):
        group = slice(first, first + kind.group)
        is_last = first >= wide_from
        importance_1L = importance_K[group][None]
        grid, errors_LN = _round_group(
            w_KN[group].numpy(),
            repair_KK[group, group].numpy(),
            importance_1L if importance_1L.any() else None,  # inputs that were always 0
            last.kind if last is not None and is_last else kind,
            last.middle if last is not None and is_last else None,
            shrinks,
            codes_KN[group],
        )
        grids.append(grid)
        w_KN[group.stop :] -= repair_KK[group, group.stop :].T @ torch.from_numpy(errors_LN)
    told = kind if last is None else last.kind
    return quantised(np.ascontiguousarray(codes_KN.T), grids, told, axis=1)


def repairs(hessian_KK: Tensor) -> Tensor:
    """The upper triangular U with H^-1 = U^T U of the damped Hessian, float32.

    Without inverting H: turned around, H = R R^T with R upper triangular, so U = R^-1.
    """
    wide_KK = hessian_KK.double()
    mean = float(wide_KK.diagonal().mean())
    if not np.isfinite(mean):
        raise ValueError("the inputs of the weights hold NaN or Inf")
    for share in DAMPING:
        damped_KK = wide_KK.clone()
        damped_KK.diagonal().add_(share * mean or 1.0)
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if not failed:
            root_KK = lower_KK.flip(0, 1)
            one_KK = torch.eye(len(root_KK), dtype=torch.float64)
            repair_KK: Tensor = torch.linalg.solve_triangular(root_KK, one_KK, upper=True)
            return repair_KK.float()
    raise ValueError("the inputs of the weights hold NaN or Inf")


def _round_group(
    w_LN: F32,
    repair_LL: F32,
    importance_1L: F32 | None,
    kind: WeightKind,
    middle: int | None,
    shrinks: tuple[float, ...],
    codes_LN: np.ndarray,
) -> tuple[Grid, F32]:
    """Write one group's codes; its grid, and the errors that later groups repair.

    ``w_LN`` is changed: no copy, and nobody needs it after.
    """
    w_N1L = np.ascontiguousarray(w_LN.T)[:, None]
    grid = find_grid(w_N1L, kind, importance_1L, shrinks, middle=middle)
    scale_N, zero_N = grid.scales_NG[:, 0], grid.zeros_NG[:, 0]
    step_N = steps(scale_N)
    errors_LN = np.empty_like(w_LN)
    for k, w_N in enumerate(w_LN):
        code_N = np.rint(w_N / step_N)
        code_N += zero_N
        np.clip(code_N, 0, kind.max_code, out=code_N)
        codes_LN[k] = code_N
        code_N -= zero_N
        code_N *= scale_N
        np.subtract(w_N, code_N, out=errors_LN[k])
        errors_LN[k] /= repair_LL[k, k]
        w_LN[k + 1 :] -= repair_LL[k, k + 1 :, None] * errors_LN[k]
    return grid, errors_LN

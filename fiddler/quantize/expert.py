"""One expert: its weights to packed bytes, and what those bytes then compute.

M tokens that the expert saw, N rows, K columns, H hidden, I width, F = 2I (gate rows, then up).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import (
    U8,
    PackedShape,
    Quantised,
    dequantise,
    pack_expert,
    unpack_expert,
)
from cpu_kernels.weight_kind import WeightKind
from fiddler.quantize.gptq import gptq
from fiddler.quantize.outliers import Columns, largest_inputs, quantise_columns, rows_at
from fiddler.rounding.grid import QUICK_SHRINKS
from fiddler.rounding.matrix import round_matrix

Method = Literal["rtn", "gptq"]
METHODS: tuple[Method, ...] = ("rtn", "gptq")

# An expert is fitted to its inputs if it saw a quarter as many as a product has columns. Errors on
# unseen inputs, w4g128z, 2,048 columns: rounding 0.092; GPTQ 0.102 with 256 inputs, 0.093 with 512,
# 0.071 with 1,024, 0.050 with 16,384.
TOKENS_DIVISOR = 4


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """``is_fitted``: to its inputs; else they were too few, and it is rounded without them."""

    packed: U8
    is_fitted: bool


def least_tokens(hidden: int, width: int) -> int:
    """Tokens that an expert must have seen to be fitted to them."""
    return max(hidden, width) // TOKENS_DIVISOR


def quantise_expert(
    w13_FH: Tensor,
    w2_HI: Tensor,
    kind: WeightKind,
    method: Method,
    x_MH: Tensor | None,
    outliers: list[int] | None = None,
) -> PackedExpert:
    """Pack float32 weights; ``x_MH`` are inputs of the expert, if there is a calibration.

    ``outliers`` are inputs whose columns have 8 bits; as many of down's are chosen here.

    "rtn" weighs errors by the inputs' mean squares, "gptq" fits to their correlations. Down's
    inputs are those that the packed gate and up give. ValueError as :func:`gptq`.
    """
    if outliers:
        return _with_outliers(w13_FH, w2_HI, kind, method, x_MH, outliers)
    width = w2_HI.shape[1]
    if x_MH is not None and len(x_MH) < least_tokens(*w2_HI.shape):
        x_MH = None
    both = _quantise(w13_FH.numpy(), kind, method, x_MH)
    gate, up = (_rows(both, half) for half in (slice(0, width), slice(width, None)))
    act_MI = None if x_MH is None else _activate(x_MH, dequantise(kind, *both))
    down = _quantise(w2_HI.numpy(), kind, method, act_MI)
    return PackedExpert(pack_expert(kind, gate, up, down), is_fitted=x_MH is not None)


def _with_outliers(
    w13_FH: Tensor,
    w2_HI: Tensor,
    kind: WeightKind,
    method: Method,
    x_MH: Tensor | None,
    outliers: list[int],
) -> PackedExpert:
    """An intermediate that down reads twice is computed twice, from the same codes.

    Down's outliers are those of the inputs, however few; without any, of the largest weights.
    """
    hidden, width = w2_HI.shape
    is_fitted = x_MH is not None and len(x_MH) >= least_tokens(hidden, width)
    fits = method == "gptq" and is_fitted
    inputs = Columns.of(hidden, outliers, kind.group)
    used_MH = x_MH if is_fitted else None
    both = quantise_columns(w13_FH.numpy(), inputs, kind, used_MH, is_fitted=fits)
    act_MI = None
    if x_MH is not None and len(x_MH):
        act_MI = _activate(inputs.inputs(x_MH), dequantise(kind, *both))
    largest = largest_inputs(w2_HI if act_MI is None else act_MI, len(outliers))
    middles = Columns.of(width, largest, kind.group)
    used_MI = act_MI if is_fitted else None
    down = quantise_columns(w2_HI.numpy(), middles, kind, used_MI, is_fitted=fits)
    gate, up = (_rows(both, half) for half in (slice(0, width), slice(width, None)))
    all_rows = np.concatenate([np.arange(hidden), np.full(len(inputs.place_P) - hidden, -1)])
    packed = pack_expert(
        kind,
        rows_at(gate, middles.place_P),
        rows_at(up, middles.place_P),
        rows_at(down, all_rows),
    )
    return PackedExpert(packed, is_fitted=is_fitted)


def apply_expert(
    packed: U8, shape: PackedShape, x_MH: Tensor, outliers: list[int] | None = None
) -> Tensor:
    """The packed expert's output ``[M, H]``, in float32."""
    gate, up, down = (dequantise(shape.kind, *part) for part in unpack_expert(shape, packed))
    hidden = x_MH.shape[1]
    if outliers:
        x_MH = Columns.of(hidden, outliers, shape.kind.group).inputs(x_MH)
    y_MH = F.linear(_activate(x_MH, np.concatenate([gate, up])), torch.from_numpy(down))
    return y_MH[:, :hidden]


def exact_and_rounded(
    w13_FH: Tensor, w2_HI: Tensor, kinds: Sequence[WeightKind], x_MH: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """An expert's output ``[M, H]``, and those with its weights rounded to each of ``kinds``.

    Rounded in a few steps, by the inputs' mean squares: to compare kinds. ValueError as
    :func:`fiddler.rounding.grid.find_grid`.
    """
    exact = F.linear(_activate(x_MH, w13_FH.numpy()), w2_HI)
    if not len(x_MH):
        return exact, [exact] * len(kinds)
    return exact, [_rounded(w13_FH, w2_HI, kind, x_MH) for kind in kinds]


def _rounded(w13_FH: Tensor, w2_HI: Tensor, kind: WeightKind, x_MH: Tensor) -> Tensor:
    act_MI = _activate(x_MH, _round(w13_FH, kind, x_MH))
    return F.linear(act_MI, torch.from_numpy(_round(w2_HI, kind, act_MI)))


def _round(w_NK: Tensor, kind: WeightKind, x_MK: Tensor) -> F32:
    importance_K = x_MK.square().mean(dim=0).numpy()
    weighing = importance_K if importance_K.any() else None
    shrinks = QUICK_SHRINKS[kind.bits]
    return dequantise(kind, *round_matrix(w_NK.numpy(), kind, weighing, shrinks))


def _activate(x_MH: Tensor, w13_FH: F32) -> Tensor:
    gate_MI, up_MI = F.linear(x_MH, torch.from_numpy(w13_FH)).chunk(2, dim=-1)
    return F.silu(gate_MI) * up_MI


def _quantise(w_NK: F32, kind: WeightKind, method: Method, x_MK: Tensor | None) -> Quantised:
    if x_MK is None:
        return round_matrix(w_NK, kind)
    if method == "gptq":
        return gptq(w_NK, x_MK.T @ x_MK, kind)
    importance_K = x_MK.square().mean(dim=0).numpy()
    return round_matrix(w_NK, kind, importance_K if importance_K.any() else None)


def _rows(both: Quantised, rows: slice) -> Quantised:
    zeros_NG = None if both.zeros_NG is None else both.zeros_NG[rows]
    return Quantised(both.codes_NK[rows], both.scales_NG[rows], zeros_NG)

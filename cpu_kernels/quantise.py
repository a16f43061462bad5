"""Rounding weights to the nearest code: no calibration, one pass over the matrix.

N rows, K columns, G groups of a row, L elements of a group.
"""

import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import F32, F64
from cpu_kernels.packed_layout import U8, Quantised, decode_scales, encode_scales
from cpu_kernels.weight_kind import Scales, WeightKind


def round_to_nearest(w_NK: F32, kind: WeightKind) -> Quantised:
    """Codes of float32 weights, each group scaled by its own extremes.

    With zero points no weight is off by more than half a scale. Without, the largest magnitude of
    the group takes the lowest code (its scale has the opposite sign), and a weight of the other
    sign beyond the last code is off by up to one scale. ValueError for NaN, Inf, or weights too
    large for scales of the kind's type.
    """
    assert kind.is_rounded and w_NK.ndim == 2, (kind, w_NK.shape)
    w_NGL = _grouped(w_NK, kind.group)
    top_NG, bottom_NG = w_NGL.max(axis=2).astype(np.float64), w_NGL.min(axis=2).astype(np.float64)
    if not (np.isfinite(top_NG) & np.isfinite(bottom_NG)).all():
        raise ValueError("the weights hold NaN or Inf: the checkpoint is damaged")
    if kind.has_zeros:
        scales_NG, zeros_NG = _of_range(top_NG, bottom_NG, kind)
        zero_NG = zeros_NG.astype(np.float32)
    else:
        scales_NG, zeros_NG = _of_extreme(top_NG, bottom_NG, kind), None
        zero_NG = np.full(scales_NG.shape, kind.middle, np.float32)
    step_NG = np.where(scales_NG == 0, np.float32(1), scales_NG)
    codes_NGL = np.rint(w_NGL / step_NG[:, :, None])
    codes_NGL += zero_NG[:, :, None]
    np.clip(codes_NGL, 0, kind.max_code, out=codes_NGL)
    codes_NP = codes_NGL.astype(np.uint8).reshape(len(w_NK), -1)
    return Quantised(np.ascontiguousarray(codes_NP[:, : w_NK.shape[1]]), scales_NG, zeros_NG)


def _grouped(w_NK: F32, group: int) -> F32:
    """[N, G, L]; the last group is filled with zeros, which change no group's scale."""
    num_rows, cols = w_NK.shape
    groups = -(-cols // group)
    if cols % group:
        w_NK = np.pad(w_NK, ((0, 0), (0, groups * group - cols)))
    return w_NK.reshape(num_rows, groups, group)


def _of_range(top_NG: F64, bottom_NG: F64, kind: WeightKind) -> tuple[F32, U8]:
    """Scales and zero points that spread the codes over [min(w, 0), max(w, 0)]."""
    top_NG, bottom_NG = np.maximum(top_NG, 0), np.minimum(bottom_NG, 0)
    scales_NG = _stored((top_NG - bottom_NG) / kind.max_code, kind.scales)
    step_NG = np.where(scales_NG == 0, np.float32(1), scales_NG).astype(np.float64)
    return scales_NG, np.rint(-bottom_NG / step_NG).astype(np.uint8)


def _of_extreme(top_NG: F64, bottom_NG: F64, kind: WeightKind) -> F32:
    """Scales that give the largest magnitude, of either sign, the code 0 (which means -8 or -128).

    Relative error on normal weights, w4 in groups of 128 / 32: 0.103 / 0.086; with codes -7..7
    around the same zero 0.117 / 0.097. w8: 0.0064 / 0.0053 and 0.0065 / 0.0053.
    """
    size_NG = _stored(np.maximum(top_NG, -bottom_NG) / kind.middle, kind.scales)
    return np.where((top_NG >= -bottom_NG) & (size_NG > 0), -size_NG, size_NG)


def _stored(ideal_NG: F64, scales: Scales) -> F32:
    """Non-negative scales rounded up to their 16-bit type, so that the extremes keep their codes.

    That matters where a type is coarse: f16 has steps of 6e-8 below 6e-5, and the nearest scale of
    a group of tiny weights could be 0.
    """
    bits_NG: npt.NDArray[np.uint16] = encode_scales(ideal_NG, scales)
    bits_NG += decode_scales(bits_NG, scales) < ideal_NG
    stored_NG = decode_scales(bits_NG, scales)
    if not np.isfinite(stored_NG).all():
        raise ValueError(f"the weights are too large for {scales} scales: choose bf16 scales")
    return stored_NG

"""Matrices of 4-bit codes in which the columns of the largest inputs have 8 (as in Atom).

Columns are ordered as :mod:`fiddler.models.outliers` says. An 8-bit code is 16 times its high half
plus its low half, so its two columns have 16 times the scale and the scale, which 16-bit floats
both have exactly, and the halves of its zero point.

M tokens, N rows, K columns, P columns of 4 bits (padded, outliers twice), Q columns before the
outliers are doubled, G groups.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import Quantised
from cpu_kernels.weight_kind import WeightKind
from fiddler.models.outliers import places
from fiddler.quantize.gptq import Last, gptq
from fiddler.rounding.matrix import round_matrix

HALF = 4  # bits
# Codes 0..255 with the zero point 136, whose halves are 8: what symmetric int4 has for both.
MIDDLE = 136


@dataclass(frozen=True, slots=True)
class Columns:
    """The order of a matrix's columns: ``place_P`` is the input of each, -1 for padding."""

    place_P: npt.NDArray[np.int64]
    num_wide: int  # columns of 8 bits with their padding; all of them twice at the end

    @classmethod
    def of(cls, size: int, outliers: list[int], group: int) -> "Columns":
        """For ``size`` inputs."""
        num_wide = -(-len(outliers) // group) * group
        return cls(np.array(places(size, outliers, group)), num_wide)

    @property
    def place_Q(self) -> npt.NDArray[np.int64]:
        """Each column once."""
        return self.place_P[: len(self.place_P) - self.num_wide]

    def inputs(self, x_MK: Tensor) -> Tensor:
        """What the columns read, ``[M, P]``."""
        return x_MK[:, torch.from_numpy(self.place_P.clip(0))]


def largest_inputs(x_MK: Tensor, count: int) -> list[int]:
    """The inputs with the largest sums of squares, in their order; equal ones: the first."""
    size_K = x_MK.double().square().sum(dim=0)
    return sorted(torch.argsort(size_K, descending=True, stable=True)[:count].tolist())


def quantise_columns(
    w_NK: F32, columns: Columns, kind: WeightKind, x_MK: Tensor | None, *, is_fitted: bool
) -> Quantised:
    """Codes ``[N, P]`` of 4 bits; with inputs, rounded or fitted to them. ValueError as gptq."""
    place_Q, num_wide = columns.place_Q, columns.num_wide
    w_NQ = np.where(place_Q >= 0, w_NK[:, place_Q], np.float32(0)).astype(np.float32)
    wide = wide_kind(kind)
    x_MQ = None
    if x_MK is not None:
        x_MQ = x_MK[:, torch.from_numpy(place_Q.clip(0))] * torch.from_numpy(place_Q >= 0)
    split = len(place_Q) - num_wide
    if x_MQ is not None and is_fitted:
        found = gptq(w_NQ, x_MQ.T @ x_MQ, kind, last=Last(num_wide, wide, _middle(kind)))
        narrow, eight = _cut(found, split, kind)
    else:
        importance_Q = None if x_MQ is None else x_MQ.square().mean(dim=0).numpy()
        parts = []
        for at, one, middle in (
            (slice(0, split), kind, None),
            (slice(split, None), wide, _middle(kind)),
        ):
            some = None if importance_Q is None else importance_Q[at]
            w_NC = np.ascontiguousarray(w_NQ[:, at])
            some = some if some is not None and some.any() else None
            parts.append(round_matrix(w_NC, one, some, middle=middle))
        narrow, eight = parts
    return _joined(narrow, eight, kind)


def wide_kind(kind: WeightKind) -> WeightKind:
    """What the columns of outliers are rounded to."""
    return replace(kind, codes="int8", has_zeros=True)


def _middle(kind: WeightKind) -> int | None:
    """The zero point of all groups of 8 bits; None: each has its own."""
    return None if kind.has_zeros else MIDDLE


def _cut(found: Quantised, split: int, kind: WeightKind) -> tuple[Quantised, Quantised]:
    """Columns of ``kind`` and those of 8 bits, which have zero points in any case."""
    codes, scales, zeros = found
    group = split // kind.group
    assert zeros is not None
    own = zeros[:, :group] if kind.has_zeros else None
    return (
        Quantised(codes[:, :split], scales[:, :group], own),
        Quantised(codes[:, split:], scales[:, group:], zeros[:, group:]),
    )


def _joined(narrow: Quantised, eight: Quantised, kind: WeightKind) -> Quantised:
    """The columns of 8 bits as two of 4 each, behind the others."""
    assert eight.zeros_NG is not None
    codes = (narrow.codes_NK, eight.codes_NK >> HALF, eight.codes_NK & (1 << HALF) - 1)
    scales = (narrow.scales_NG, eight.scales_NG * np.float32(1 << HALF), eight.scales_NG)
    zeros_NG = None
    if narrow.zeros_NG is not None:
        halves = eight.zeros_NG >> HALF, eight.zeros_NG & (1 << HALF) - 1
        zeros_NG = np.concatenate([narrow.zeros_NG, *halves], axis=1)
    return Quantised(np.concatenate(codes, axis=1), np.concatenate(scales, axis=1), zeros_NG)


def rows_at(found: Quantised, place: npt.NDArray[np.int64]) -> Quantised:
    """Rows by number; where it is -1 all weights are 0."""
    zeros_NG = None if found.zeros_NG is None else found.zeros_NG[place]
    scales_NG = np.where(place[:, None] >= 0, found.scales_NG[place], np.float32(0))
    return Quantised(found.codes_NK[place], scales_NG, zeros_NG)

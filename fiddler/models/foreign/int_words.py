"""Layouts of 4 or 8 bit integers in 32-bit words: GPTQ, AWQ, and compressed-tensors' packed one.

Shapes: N rows (outputs), K columns (inputs), G groups of a row, W words.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import Quantised, dequantise
from cpu_kernels.weight_kind import GROUPS, Codes, WeightKind
from fiddler.errors import CheckpointError
from fiddler.models.foreign.layout import (
    FLOATS,
    Matrix,
    Reader,
    StoredPart,
    as_stored,
    nibbles,
    scales_of,
    spread,
    unpacked,
)

CODES: dict[int, Codes] = {4: "int4", 8: "int8"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, from the lowest


@dataclass(frozen=True, slots=True)
class _Integers(ABC):
    """``group``: columns that share a scale, 0: all of a row."""

    bits: int
    group: int
    has_zeros: bool

    def kind(self, stored: str) -> WeightKind:
        group = self.group if self.group in GROUPS else max(GROUPS)
        return WeightKind(CODES[self.bits], group, scales_of(stored), self.has_zeros)

    def codes(self, reader: Reader, matrix: Matrix, rows: slice, kind: WeightKind) -> Quantised:
        found = self._spread(self._stored(reader, matrix, rows), kind.group)
        return found._replace(scales_NG=as_stored(found.scales_NG, kind.scales))

    def numbers(self, reader: Reader, matrix: Matrix, rows: slice) -> F32:
        kind = self.kind("float32")
        return dequantise(kind, *self._spread(self._stored(reader, matrix, rows), kind.group))

    @abstractmethod
    def _stored(self, reader: Reader, matrix: Matrix, rows: slice) -> Quantised:
        """Scales and zero points as they are, of the groups that there are."""

    def _groups(self, matrix: Matrix) -> int:
        return -(-matrix.cols // self.group) if self.group else 1

    def _spread(self, found: Quantised, wanted: int) -> Quantised:
        cols, zeros_NG = found.codes_NK.shape[1], found.zeros_NG
        return Quantised(
            found.codes_NK,
            spread(found.scales_NG, self.group, cols, wanted),
            None if zeros_NG is None else spread(zeros_NG, self.group, cols, wanted),
        )


@dataclass(frozen=True, slots=True)
class Gptq(_Integers):
    """``qweight [K / (32 / bits), N]``: a word holds neighbours along K, the first lowest.

    ``qzeros [G, N bits / 32]`` are zero points less ``zero_offset``, modulo the codes' range;
    ``scales [G, N]``; ``g_idx [K]`` is each column's group.
    """

    zero_offset: int = 1

    @property
    def name(self) -> str:
        return "gptq"

    def marker(self, stem: str) -> tuple[str, str]:
        return f"{stem}.qweight", "I32"

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        stem, rows, cols = matrix.stem, matrix.rows, matrix.cols
        groups, per_word = self._groups(matrix), 32 // self.bits
        return (
            StoredPart(f"{stem}.qweight", (cols // per_word, rows), ("I32",)),
            StoredPart(f"{stem}.qzeros", (groups, rows // per_word), ("I32",)),
            StoredPart(f"{stem}.scales", (groups, rows), FLOATS),
            StoredPart(f"{stem}.g_idx", (cols,), ("I32",), is_needed=False),
        )

    def _stored(self, reader: Reader, matrix: Matrix, rows: slice) -> Quantised:
        weight, zero, scale, order = self.parts(matrix)
        if reader.has(order):
            self._check_order(reader.bits(order), order.name)
        codes_NK = unpacked(np.ascontiguousarray(reader.bits(weight)[:, rows].T), self.bits)
        zeros_GN = unpacked(np.ascontiguousarray(reader.bits(zero)), self.bits)[:, rows]
        zeros_NG = (zeros_GN.T + np.uint8(self.zero_offset)) & np.uint8((1 << self.bits) - 1)
        if not self.has_zeros and (zeros_NG != 1 << (self.bits - 1)).any():
            raise CheckpointError(
                f"tensor {zero.name} holds zero points, but the config.json says sym = true"
            )
        scales_NG = np.ascontiguousarray(reader.floats(scale)[:, rows].T)
        return Quantised(codes_NK, scales_NG, zeros_NG if self.has_zeros else None)

    def _check_order(self, group_K: np.ndarray, name: str) -> None:
        plain_K = np.arange(len(group_K)) // (self.group or len(group_K))
        if (group_K != plain_K).any():
            raise CheckpointError(
                f"tensor {name} shuffles columns among groups (desc_act), which fiddler "
                "cannot read",
                hint="take a repository quantised with desc_act false",
            )


@dataclass(frozen=True, slots=True)
class Awq(_Integers):
    """``qweight [K, N / 8]``: a word holds eight rows' codes, in the order of ``AWQ_ORDER``.

    ``qzeros [G, N / 8]`` likewise; ``scales [G, N]``.
    """

    @property
    def name(self) -> str:
        return "awq"

    def marker(self, stem: str) -> tuple[str, str]:
        return f"{stem}.qweight", "I32"

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        stem, rows, cols = matrix.stem, matrix.rows, matrix.cols
        groups = self._groups(matrix)
        return (
            StoredPart(f"{stem}.qweight", (cols, rows // 8), ("I32",)),
            StoredPart(f"{stem}.qzeros", (groups, rows // 8), ("I32",)),
            StoredPart(f"{stem}.scales", (groups, rows), FLOATS),
        )

    def _stored(self, reader: Reader, matrix: Matrix, rows: slice) -> Quantised:
        weight, zero, scale = self.parts(matrix)
        words = slice(rows.start // 8, -(-rows.stop // 8))
        codes_KN, zeros_GN = (
            nibbles(np.ascontiguousarray(reader.bits(part)[:, words]), AWQ_ORDER)
            for part in (weight, zero)
        )
        scales_NG = np.ascontiguousarray(reader.floats(scale)[:, rows].T)
        return Quantised(np.ascontiguousarray(codes_KN.T), scales_NG, zeros_GN.T)


@dataclass(frozen=True, slots=True)
class PackQuantized(_Integers):
    """``weight_packed [N, K bits / 32]``: a word holds neighbours along K, the first lowest.

    ``weight_scale [N, G]``; ``weight_zero_point [N bits / 32, G]``: neighbours along N.
    ``weight_g_idx [K]`` where columns were shuffled.
    """

    @property
    def name(self) -> str:
        return "compressed-tensors pack-quantized"

    def marker(self, stem: str) -> tuple[str, str]:
        return f"{stem}.weight_packed", "I32"

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        stem, rows, cols = matrix.stem, matrix.rows, matrix.cols
        groups, per_word = self._groups(matrix), 32 // self.bits
        zeros = StoredPart(
            f"{stem}.weight_zero_point", (-(-rows // per_word), groups), ("I32",), self.has_zeros
        )
        return (
            StoredPart(f"{stem}.weight_packed", (rows, -(-cols // per_word)), ("I32",)),
            zeros,
            StoredPart(f"{stem}.weight_scale", (rows, groups), FLOATS),
            StoredPart(f"{stem}.weight_g_idx", (cols,), ("I32",), is_needed=False),
        )

    def _stored(self, reader: Reader, matrix: Matrix, rows: slice) -> Quantised:
        weight, zero, scale, order = self.parts(matrix)
        if reader.has(order):
            raise CheckpointError(
                f"tensor {order.name} shuffles columns among groups (actorder), which fiddler "
                "cannot read",
                hint="take a repository quantised without actorder, or with actorder weight",
            )
        codes_NK = unpacked(np.ascontiguousarray(reader.bits(weight)[rows]), self.bits)
        codes_NK = np.ascontiguousarray(codes_NK[:, : matrix.cols])
        zeros_NG = None
        if self.has_zeros:
            per_word = 32 // self.bits
            words = slice(rows.start // per_word, -(-rows.stop // per_word))
            zeros_GN = unpacked(np.ascontiguousarray(reader.bits(zero)[words].T), self.bits)
            zeros_NG = zeros_GN.T[: rows.stop - rows.start]
        return Quantised(codes_NK, reader.floats(scale)[rows], zeros_NG)

"""MXFP4: blocks of 32 numbers of e2m1 that share a power of two.

e2m1 has 0, 0.5, 1, 1.5, 2, 3, 4 and 6: twice them are whole, so experts become int8 in groups of
32 without an error (int4 ends at 7). bfloat16 scales have every power of two.

Shapes: E experts, F = 2I, N rows, K columns, G groups of 32, X = 16 bytes of one.
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import U8, Quantised, dequantise
from cpu_kernels.weight_kind import WeightKind
from fiddler.models.foreign.layout import Matrix, Reader, StoredPart

GROUP = 32
KIND = WeightKind("int8", GROUP, "bf16")
# codes of int8 for each nibble: 128 and twice the number
TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int16)
CODES: U8 = np.concatenate([128 + TWICE, 128 - TWICE]).astype(np.uint8)
NAN_SCALE = 255


def unpack(bytes_NGX: U8, exponents_NG: U8) -> Quantised:
    """Codes of rows; the low nibble of a byte is the earlier column."""
    codes = np.stack([CODES[bytes_NGX & 15], CODES[bytes_NGX >> 4]], axis=-1)
    # 127 is the bias of the exponents, and one is for the doubled codes
    scales_NG = np.ldexp(np.float32(1), exponents_NG.astype(np.int32) - 128)
    scales_NG = np.where(exponents_NG == NAN_SCALE, np.float32(np.nan), scales_NG)
    return Quantised(codes.reshape(len(codes), -1), scales_NG.astype(np.float32), None)


@dataclass(frozen=True, slots=True)
class Mxfp4Stacked:
    """gpt-oss: all experts of a layer in one tensor.

    ``gate_up_proj_blocks [E, F, G, X]`` (gate and up rows in turn) and ``down_proj_blocks
    [E, H, G, X]``, each with ``_scales`` without the X.
    """

    @property
    def name(self) -> str:
        return "mxfp4"

    def kind(self, stored: str) -> WeightKind:
        return KIND

    def marker(self, stem: str) -> tuple[str, str]:
        return f"{stem}_blocks", "U8"

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        is_down = matrix.role == "down"
        stem = matrix.stem.rpartition(f".{matrix.expert}.")[0]
        stem += ".down_proj" if is_down else ".gate_up_proj"
        rows = matrix.rows if is_down else 2 * matrix.rows
        shape = matrix.num_experts, rows, matrix.cols // GROUP
        return (
            StoredPart(f"{stem}_blocks", (*shape, GROUP // 2), ("U8",)),
            StoredPart(f"{stem}_scales", shape, ("U8",)),
        )

    def codes(self, reader: Reader, matrix: Matrix, rows: slice, kind: WeightKind) -> Quantised:
        first, stride = {"gate": (0, 2), "up": (1, 2), "down": (0, 1)}[matrix.role]
        some = slice(first + stride * rows.start, first + stride * (rows.stop - 1) + 1, stride)
        blocks, scales = (reader.bits(part)[matrix.expert, some] for part in self.parts(matrix))
        return unpack(blocks, scales)

    def numbers(self, reader: Reader, matrix: Matrix, rows: slice) -> F32:
        return dequantise(KIND, *self.codes(reader, matrix, rows, KIND))


@dataclass(frozen=True, slots=True)
class Mxfp4Packed:
    """compressed-tensors: ``weight_packed [N, K / 2]`` and ``weight_scale [N, K / 32]``, bytes."""

    @property
    def name(self) -> str:
        return "compressed-tensors mxfp4-pack-quantized"

    def kind(self, stored: str) -> WeightKind:
        return KIND

    def marker(self, stem: str) -> tuple[str, str]:
        return f"{stem}.weight_packed", "U8"

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        stem, rows, cols = matrix.stem, matrix.rows, matrix.cols
        return (
            StoredPart(f"{stem}.weight_packed", (rows, cols // 2), ("U8",)),
            StoredPart(f"{stem}.weight_scale", (rows, cols // GROUP), ("U8",)),
        )

    def codes(self, reader: Reader, matrix: Matrix, rows: slice, kind: WeightKind) -> Quantised:
        blocks, scales = (reader.bits(part)[rows] for part in self.parts(matrix))
        return unpack(blocks.reshape(len(blocks), -1, GROUP // 2), scales)

    def numbers(self, reader: Reader, matrix: Matrix, rows: slice) -> F32:
        return dequantise(KIND, *self.codes(reader, matrix, rows, KIND))

"""fp8 e4m3 with a scale for each block of rows and columns, as DeepSeek and Qwen publish it.

Experts become int8 in groups of 128. A group's step is the power of two (times the block's scale)
that puts its largest code between 64 and 120: fp8 numbers of the four largest powers of two, all
above an eighth of the group's largest, are whole multiples of that step, and only smaller ones are
rounded. Error of normal weights on the way: 0.0054, beside 0.026 that fp8 has cost them already.

Shapes: N rows, K columns, P columns padded to groups, G groups of a row, L columns of a group.
"""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import U8, Quantised, decode_scales, encode_scales
from cpu_kernels.weight_kind import WeightKind
from fiddler.models.foreign.layout import FLOATS, Matrix, Reader, StoredPart

GROUP = 128


def _e4m3() -> F32:
    """The number of each code: sign, 4 bits of exponent (bias 7), 3 of mantissa; 127 is NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    numbers = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    numbers[127] = np.nan
    return np.concatenate([numbers, -numbers]).astype(np.float32)


E4M3 = _e4m3()


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """``weight [N, K]`` and its scales, what codes are multiplied by, one for each block.

    ``block`` is rows and columns; 0 columns: all. Columns are a multiple of 128.
    """

    block: tuple[int, int]
    scale: str = "weight_scale_inv"  # the multiplier, for all its name

    @property
    def name(self) -> str:
        return "fp8"

    def kind(self, stored: str) -> WeightKind:
        return WeightKind("int8", GROUP)

    def marker(self, stem: str) -> tuple[str, str]:
        return f"{stem}.weight", "F8_E4M3"

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        rows, cols = self.block
        blocks = -(-matrix.rows // rows), -(-matrix.cols // cols) if cols else 1
        return (
            StoredPart(f"{matrix.stem}.weight", (matrix.rows, matrix.cols), ("F8_E4M3",)),
            StoredPart(f"{matrix.stem}.{self.scale}", blocks, FLOATS),
        )

    def codes(self, reader: Reader, matrix: Matrix, rows: slice, kind: WeightKind) -> Quantised:
        w_NK = self.numbers(reader, matrix, rows)
        block_NG = self._scales(reader, matrix, rows, kind.group)
        groups = block_NG.shape[1]
        w_NGL = np.zeros((len(w_NK), groups * kind.group), np.float32)
        w_NGL[:, : matrix.cols] = w_NK
        w_NGL = w_NGL.reshape(len(w_NK), groups, kind.group)
        largest_NG = np.abs(w_NGL).max(axis=2)
        unscaled_NG = np.divide(largest_NG, block_NG, where=block_NG != 0, out=largest_NG.copy())
        _, exponent_NG = np.frexp(np.abs(unscaled_NG))
        ideal_NG = np.ldexp(np.abs(block_NG), exponent_NG - 7)
        bits_NG = encode_scales(np.where(largest_NG > 0, ideal_NG, 0), kind.scales)
        # a step too small for its type is the least that there is
        bits_NG = np.where((bits_NG == 0) & (largest_NG > 0), np.uint16(1), bits_NG)
        scales_NG = decode_scales(bits_NG, kind.scales)
        w_NGL /= np.where(scales_NG == 0, np.float32(1), scales_NG)[:, :, None]
        codes_NP: U8 = (np.clip(np.rint(w_NGL), -127, 127) + 128).astype(np.uint8)
        codes_NP = codes_NP.reshape(len(w_NK), -1)
        return Quantised(np.ascontiguousarray(codes_NP[:, : matrix.cols]), scales_NG, None)

    def numbers(self, reader: Reader, matrix: Matrix, rows: slice) -> F32:
        w_NK: F32 = E4M3[reader.bits(self.parts(matrix)[0])[rows]]
        scales_NG = self._scales(reader, matrix, rows, GROUP)
        w_NK *= np.repeat(scales_NG, GROUP, axis=1)[:, : matrix.cols]
        return w_NK

    def _scales(self, reader: Reader, matrix: Matrix, rows: slice, group: int) -> F32:
        """Of each row's groups."""
        block_rows, block_cols = self.block
        row_N = np.arange(rows.start, rows.stop) // block_rows
        first_G = np.arange(-(-matrix.cols // group)) * group
        col_G = first_G // block_cols if block_cols else first_G * 0
        scales_NG: F32 = reader.floats(self.parts(matrix)[1])[row_N[:, None], col_G]
        return scales_NG

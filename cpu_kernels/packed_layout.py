"""Bytes of packed experts: what CPU kernels read as one stream and GPUs receive as it is.

The picture is in docs/packed-experts.md. N rows, K columns, P columns padded to whole groups,
G groups of a row, B blocks of 16 rows, I expert width, H hidden.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import F32, U16, bf16_to_f32, f32_to_bf16
from cpu_kernels.weight_kind import Scales, WeightKind

U8 = npt.NDArray[np.uint8]

BLOCK_ROWS = 16  # float32 lanes of a 512-bit vector: a row is a lane, no sum crosses lanes
ALIGNMENT = 64  # bytes of a cache line


class Quantised(NamedTuple):
    """A matrix as codes; ``scales_NG`` holds values that the kind's 16-bit type has exactly."""

    codes_NK: U8
    scales_NG: F32
    zeros_NG: U8 | None  # None for a symmetric kind


@dataclass(frozen=True)
class MatrixShape:
    """Sizes of one packed [rows, cols] matrix; all offsets and sizes are bytes."""

    kind: WeightKind
    rows: int
    cols: int

    def __post_init__(self) -> None:
        assert self.kind.is_packed and self.rows > 0 and self.cols > 0, self

    @cached_property
    def groups(self) -> int:
        return -(-self.cols // self.kind.group)

    @cached_property
    def padded_cols(self) -> int:
        return self.groups * self.kind.group

    @cached_property
    def num_blocks(self) -> int:
        return -(-self.rows // BLOCK_ROWS)

    @cached_property
    def scale_offset(self) -> int:
        """Where the scales of a block begin, after its codes."""
        return BLOCK_ROWS * self.padded_cols * self.kind.bits // 8

    @cached_property
    def zero_offset(self) -> int:
        """Where the zero points of a block begin, or would begin: behind the scales."""
        per_row = 1 if self.kind.is_lossless else self.groups
        return self.scale_offset + 2 * BLOCK_ROWS * per_row

    @cached_property
    def most_exceptions(self) -> int:
        """Of a block of bf12: 1/256 of its weights, in whole cache lines."""
        assert self.kind.is_lossless, self
        return -(-self.padded_cols // 256) * 16

    @cached_property
    def block_bytes(self) -> int:
        if self.kind.is_lossless:  # codes; a line of scales and of ends; exceptions of 4 bytes
            return self.scale_offset + ALIGNMENT + 4 * self.most_exceptions
        used = self.zero_offset + BLOCK_ROWS * self.groups * self.kind.has_zeros
        return -(-used // ALIGNMENT) * ALIGNMENT

    @cached_property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True)
class PackedShape:
    """Sizes of one packed expert: gate and up blocks in turn, then w2's blocks."""

    kind: WeightKind
    hidden: int
    width: int

    @cached_property
    def gate(self) -> MatrixShape:
        """One half of w13; up has the same shape."""
        return MatrixShape(self.kind, self.width, self.hidden)

    @cached_property
    def down(self) -> MatrixShape:
        """w2, [hidden, width]."""
        return MatrixShape(self.kind, self.hidden, self.width)

    @cached_property
    def w2_offset(self) -> int:
        return 2 * self.gate.nbytes

    @cached_property
    def expert_bytes(self) -> int:
        return self.w2_offset + self.down.nbytes


def encode_scales(values: npt.NDArray[np.floating[Any]], scales: Scales) -> U16:
    """Bits of ``values`` in the 16-bit type, rounded to nearest; too large becomes Inf."""
    with np.errstate(over="ignore"):
        if scales == "f16":
            return np.ascontiguousarray(values, np.float16).view(np.uint16)
        return f32_to_bf16(values)


def decode_scales(bits: U16, scales: Scales) -> F32:
    """The exact float32 values of 16-bit scales."""
    return bits.view(np.float16).astype(np.float32) if scales == "f16" else bf16_to_f32(bits)


def dequantise(kind: WeightKind, codes_NK: U8, scales_NG: F32, zeros_NG: U8 | None) -> F32:
    """The weights, exact: 11 bits of scale times 9 of code fit in float32's 24."""
    cols = codes_NK.shape[1]
    zero_NG = np.full(scales_NG.shape, kind.middle, np.uint8) if zeros_NG is None else zeros_NG
    weights_NK = codes_NK.astype(np.float32)
    weights_NK -= np.repeat(zero_NG, kind.group, axis=1)[:, :cols]
    weights_NK *= np.repeat(scales_NG, kind.group, axis=1)[:, :cols]
    return weights_NK


def pack_matrix(kind: WeightKind, codes_NK: U8, scales_NG: F32, zeros_NG: U8 | None) -> U8:
    """The blocks of a matrix, uint8 [B, block_bytes].

    ValueError if shapes or types do not fit the kind, a code or zero point is too large, or a scale
    is not finite and exact in the kind's type.
    """
    shape = MatrixShape(kind, *codes_NK.shape)
    _check(shape, codes_NK, scales_NG, zeros_NG)
    blocks = np.zeros((shape.num_blocks, shape.block_bytes), np.uint8)
    blocks[:, : shape.scale_offset] = _pack_codes(shape, codes_NK, zeros_NG)
    scale_bits_NG = encode_scales(scales_NG, kind.scales)
    blocks[:, shape.scale_offset : shape.zero_offset] = _row_last(scale_bits_NG, shape)
    if zeros_NG is not None:
        end = shape.zero_offset + BLOCK_ROWS * shape.groups
        blocks[:, shape.zero_offset : end] = _row_last(zeros_NG, shape)
    return blocks


def unpack_matrix(kind: WeightKind, rows: int, cols: int, packed: U8) -> Quantised:
    """What :func:`pack_matrix` was given; ``packed`` holds its bytes in any shape."""
    shape = MatrixShape(kind, rows, cols)
    blocks = packed.reshape(shape.num_blocks, shape.block_bytes)
    codes_NK = _unpack_codes(shape, blocks[:, : shape.scale_offset])
    scale_bytes = blocks[:, shape.scale_offset : shape.zero_offset]
    scale_bits_NG = _row_first(scale_bytes, shape, np.dtype(np.uint16))
    zeros_NG = None
    if kind.has_zeros:
        end = shape.zero_offset + BLOCK_ROWS * shape.groups
        zeros_NG = _row_first(blocks[:, shape.zero_offset : end], shape, np.dtype(np.uint8))
    return Quantised(codes_NK, decode_scales(scale_bits_NG, kind.scales), zeros_NG)


def pack_expert(kind: WeightKind, gate_IH: Quantised, up_IH: Quantised, down_HI: Quantised) -> U8:
    """One expert's bytes, [expert_bytes]; ValueError as in :func:`pack_matrix`."""
    hidden, width = down_HI.codes_NK.shape
    for name, half in (("gate", gate_IH), ("up", up_IH)):
        if half.codes_NK.shape != (width, hidden):
            raise ValueError(f"{name} must be {(width, hidden)}, not {half.codes_NK.shape}")
    halves = (pack_matrix(kind, *gate_IH), pack_matrix(kind, *up_IH))
    down = pack_matrix(kind, *down_HI)
    return np.concatenate([np.stack(halves, axis=1).ravel(), down.ravel()])


def unpack_expert(shape: PackedShape, blob: U8) -> tuple[Quantised, Quantised, Quantised]:
    """Gate, up and down as :func:`pack_expert` was given them."""
    w13 = blob[: shape.w2_offset].reshape(shape.gate.num_blocks, 2, shape.gate.block_bytes)
    gate_IH, up_IH = (
        unpack_matrix(shape.kind, shape.width, shape.hidden, np.ascontiguousarray(w13[:, half]))
        for half in (0, 1)
    )
    down = blob[shape.w2_offset : shape.expert_bytes]
    return gate_IH, up_IH, unpack_matrix(shape.kind, shape.hidden, shape.width, down)


def _pack_codes(shape: MatrixShape, codes_NK: U8, zeros_NG: U8 | None) -> U8:
    """[B, scale_offset] bytes of codes; padded columns hold the zero point, padded rows too."""
    kind = shape.kind
    if shape.padded_cols > shape.cols:
        padded_NP = np.empty((shape.rows, shape.padded_cols), np.uint8)
        padded_NP[:, : shape.cols] = codes_NK
        padded_NP[:, shape.cols :] = kind.middle if zeros_NG is None else zeros_NG[:, -1:]
        codes_NK = padded_NP
    words = np.ascontiguousarray(codes_NK).view(np.uint32)
    if kind.bits == 4:
        words = words[:, 0::2] | words[:, 1::2] << np.uint32(4)
    middles = 0x88888888 if kind.bits == 4 else 0x80808080
    row_padding = 0 if kind.has_zeros else middles
    return _row_last(words, shape, row_padding)


def _unpack_codes(shape: MatrixShape, code_bytes: U8) -> U8:
    words = _row_first(code_bytes, shape, np.dtype(np.uint32))
    if shape.kind.bits == 4:
        low, high = words & np.uint32(0x0F0F0F0F), words >> np.uint32(4) & np.uint32(0x0F0F0F0F)
        words = np.stack([low, high], axis=2).reshape(shape.rows, -1)
    return np.ascontiguousarray(words.view(np.uint8)[:, : shape.cols])


def _row_last(values_NC: npt.NDArray[Any], shape: MatrixShape, padding: int = 0) -> U8:
    """[N, C] in blocks as [B, C, 16 rows], the bytes of each block in one row."""
    blocks, cols = shape.num_blocks, values_NC.shape[1]
    if shape.rows < blocks * BLOCK_ROWS:
        padded = np.full((blocks * BLOCK_ROWS, cols), padding, values_NC.dtype)
        padded[: shape.rows] = values_NC
        values_NC = padded
    turned = values_NC.reshape(blocks, BLOCK_ROWS, cols).transpose(0, 2, 1)
    return np.ascontiguousarray(turned).reshape(blocks, -1).view(np.uint8)


def _row_first(block_bytes: U8, shape: MatrixShape, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The inverse of :func:`_row_last`, [N, C] without the padded rows."""
    values = np.ascontiguousarray(block_bytes).view(dtype)
    turned = values.reshape(shape.num_blocks, -1, BLOCK_ROWS).transpose(0, 2, 1)
    return np.ascontiguousarray(turned).reshape(shape.num_blocks * BLOCK_ROWS, -1)[: shape.rows]


def _check(shape: MatrixShape, codes_NK: U8, scales_NG: F32, zeros_NG: U8 | None) -> None:
    kind, groups = shape.kind, (shape.rows, shape.groups)
    if (zeros_NG is not None) != kind.has_zeros:
        raise ValueError(f"{kind.name} weights {'need' if kind.has_zeros else 'have no'} zeros")
    for name, array, wanted in (("codes", codes_NK, codes_NK.shape), ("zeros", zeros_NG, groups)):
        if array is None:
            continue
        if array.dtype != np.uint8 or array.shape != wanted:
            raise ValueError(f"{name} must be uint8 {wanted}, not {array.dtype} {array.shape}")
        if kind.bits < 8 and int(array.max()) > kind.max_code:
            raise ValueError(f"{name} of {kind.name} weights end at {kind.max_code}")
    if scales_NG.dtype != np.float32 or scales_NG.shape != groups:
        raise ValueError(
            f"scales must be float32 {groups}, not {scales_NG.dtype} {scales_NG.shape}"
        )
    stored_NG = decode_scales(encode_scales(scales_NG, kind.scales), kind.scales)
    if not (np.isfinite(stored_NG) & (stored_NG == scales_NG)).all():
        raise ValueError(f"scales must be finite numbers that {kind.scales} has exactly")

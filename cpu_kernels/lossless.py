"""bfloat16 weights in 12 bits, without loss: bf12 blocks of 16 rows, and back.

Of a row's weights nearly all have one of 15 neighbouring exponents. Such a weight is a code of 12
bits: sign, exponent less the row's lowest plus one, the 7 bits of the mantissa. Code 0 is zero. The
row's scale is a power of two, and ``weight = scale * (the bfloat16 with the code's exponent)``,
exact. The other weights, of normal numbers two in 10,000, are listed behind the codes of their
block, where they have code 0. (Zhang et al., "70% Size, 100% Accuracy", 2025, section 2, measure
2.6 bits of information in the exponents of language models; codes of one length need no search.)

A word is 32 bits: two weights of a row, each with sign, four bits of another weight, exponent and
mantissa. Three words are eight weights; 64 columns have all their first words side by side, then
the second ones, then the third (docs/packed-experts.md has the picture).

N rows, K columns, B blocks.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from cpu_kernels.bf16 import U16
from cpu_kernels.compiled import entry
from cpu_kernels.packed_layout import ALIGNMENT, BLOCK_ROWS, U8, MatrixShape
from cpu_kernels.weight_kind import BF12

EXPONENTS = 15  # of a row's codes; 0 is for zero
MOST_SHIFT = 127  # the largest power of two that bfloat16 has
MOST_COLUMNS = 1 << 16  # an exception has 16 bits for its column
WORDS = 3  # for eight columns
STEPS = 8  # of eight columns in a group, whose first words lie together, then second, then third

Words = npt.NDArray[np.uint32]

# what make_packer's function takes: matrices whose rows may lie apart, and three sizes
PACKER = (
    types.Array(types.uint16, 2, "A", readonly=True),
    types.Array(types.uint8, 2, "A"),
    *(types.int64,) * 3,
)


def pack_lossless(weights_NK: U16, blocks_BX: U8) -> None:
    """Write the bfloat16 with the bits ``weights_NK`` as blocks, uint8 [B, block_bytes].

    ``blocks_BX`` may be a view of every other block. ValueError if a weight is Inf or NaN, a
    block has more exceptions than there is room for, or a row more than MOST_COLUMNS weights; it
    says which. Releases the GIL.
    """
    shape = MatrixShape(BF12, *weights_NK.shape)
    assert weights_NK.dtype == np.uint16 and weights_NK.strides[1] == 2
    assert blocks_BX.shape == (shape.num_blocks, shape.block_bytes) and blocks_BX.strides[1] == 1
    if shape.cols > MOST_COLUMNS:
        raise ValueError(f"rows have {shape.cols} weights, more than {MOST_COLUMNS}")
    row = entry(make_packer, PACKER)(
        weights_NK, blocks_BX, shape.scale_offset, shape.most_exceptions, shape.padded_cols
    )
    if row < 0:
        return
    if not is_finite(weights_NK[row]):
        raise ValueError("the weights hold NaN or Inf: the checkpoint is damaged")
    raise ValueError(
        f"16 neighbouring rows have more than {shape.most_exceptions} weights with exponents of "
        "their own"
    )


def lossless_blocks(weights_NK: U16) -> U8:
    """The same in new memory."""
    shape = MatrixShape(BF12, *weights_NK.shape)
    blocks_BX = np.empty((shape.num_blocks, shape.block_bytes), np.uint8)
    pack_lossless(weights_NK, blocks_BX)
    return blocks_BX


def is_finite(bits: U16) -> bool:
    """Whether all of these bfloat16 are numbers."""
    return not (bits & 0x7F80 == 0x7F80).any()


def unpack_lossless(rows: int, cols: int, blocks_BX: U8) -> U16:
    """The bits of what :func:`pack_lossless` was given, [N, K]: the reference of all kernels."""
    shape = MatrixShape(BF12, rows, cols)
    blocks = np.ascontiguousarray(blocks_BX).reshape(shape.num_blocks, shape.block_bytes)
    code_bytes = np.ascontiguousarray(blocks[:, : shape.scale_offset])
    groups = code_bytes.view(np.uint32).reshape(shape.num_blocks, -1, WORDS, STEPS, BLOCK_ROWS)
    words = groups.swapaxes(2, 3).reshape(shape.num_blocks, -1, WORDS, BLOCK_ROWS)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).astype(np.uint16)
    direct = halves & 0x87FF  # [B, steps, 3, rows, 2]
    fourth = (
        halves[:, :, 0] >> 4 & 0x0780
        | halves[:, :, 1] >> 8 & 0x0078
        | halves[:, :, 2] >> 11 & 0x0007
        | halves[:, :, 2] << 1 & 0x8000
    )
    codes = np.concatenate([direct, fourth[:, :, None]], axis=2)  # [B, steps, 4, rows, 2]
    codes_NK = codes.transpose(0, 3, 1, 2, 4).reshape(-1, shape.padded_cols)
    scales, ends, entries = _behind(blocks, shape)
    shift_N = (scales.reshape(-1) >> 7).astype(np.int32) - MOST_SHIFT
    exponent_NK = (codes_NK >> 7 & 0xF).astype(np.int32)
    moved_NK = np.where(exponent_NK > 0, exponent_NK + shift_N[:, None], 0)
    bits_NK = (codes_NK & 0x807F | moved_NK << 7).astype(np.uint16)
    for block in range(shape.num_blocks):
        firsts = np.concatenate([[0], ends[block, :-1]])
        for r in range(BLOCK_ROWS):
            of_row = entries[block, firsts[r] : ends[block, r]]
            bits_NK[block * BLOCK_ROWS + r, of_row & 0xFFFF] = of_row >> 16
    return np.ascontiguousarray(bits_NK[:rows, :cols])


def _behind(blocks: U8, shape: MatrixShape) -> tuple[U16, U16, Words]:
    """What follows the codes: scales [B, 16] (bits), ends [B, 16] and exceptions [B, most]."""
    at, half = shape.scale_offset, ALIGNMENT // 2
    scales, ends, entries = np.split(blocks[:, at:], [half, 2 * half], axis=1)
    return (
        np.ascontiguousarray(scales).view(np.uint16),
        np.ascontiguousarray(ends).view(np.uint16),
        np.ascontiguousarray(entries).view(np.uint32),
    )


@numba.njit(nogil=True)
def _lowest_exponent(row: Any, counts: Any) -> int:
    """The first of the 15 neighbouring exponents that most weights of the row have."""
    counts[:] = 0
    for k in range(len(row)):
        counts[(row[k] >> 7) & 0xFF] += 1
    within = 0
    for exponent in range(1, 16):
        within += counts[exponent]
    best, lowest = within, 1
    for first in range(2, 129):  # the scale, 2 ** (first - 1), has to be a number of bfloat16
        within += counts[first + 14] - counts[first - 1]
        if within > best:
            best, lowest = within, first
    return lowest


@numba.njit(nogil=True)
def _spread(codes: Any, words: Any, r: int) -> None:
    """The codes of row ``r`` as words of its block: of every eight the last two in the others."""
    for s in range(len(codes) // 8):
        for half in range(2):
            last = np.uint32(codes[8 * s + 6 + half])
            parts = (
                (last >> np.uint32(7)) & np.uint32(0xF),
                (last >> np.uint32(3)) & np.uint32(0xF),
                (last & np.uint32(7)) | ((last >> np.uint32(12)) & np.uint32(8)),
            )
            for j in range(3):
                code = np.uint32(codes[8 * s + 2 * j + half]) | parts[j] << np.uint32(11)
                at = (s // 8 * 24 + j * 8 + s % 8) * 16 + r
                if half == 0:
                    words[at] = code
                else:
                    words[at] |= code << np.uint32(16)


def make_packer() -> Callable[..., int]:
    """Compiled as PACKER says: all blocks; -1, or a row with what is not finite or has no room."""

    def pack_rows(weights: Any, blocks: Any, scale_offset: int, most: int, padded_cols: int) -> int:
        num_rows, num_cols = weights.shape
        codes = np.zeros(padded_cols, np.uint16)
        counts = np.zeros(256, np.int64)
        for block in range(len(blocks)):
            words = blocks[block, :scale_offset].view(np.uint32)
            scales = blocks[block, scale_offset : scale_offset + 32].view(np.uint16)
            ends = blocks[block, scale_offset + 32 : scale_offset + 64].view(np.uint16)
            entries = blocks[block, scale_offset + 64 :].view(np.uint32)
            entries[:] = 0
            used = 0
            for r in range(16):
                row = block * 16 + r
                lowest = 1
                if row < num_rows:
                    lowest = _lowest_exponent(weights[row], counts)
                    if counts[255]:
                        return row
                    for k in range(num_cols):
                        bits = weights[row, k]
                        exponent = (bits >> 7) & 0xFF
                        place = exponent - lowest
                        if 0 <= place < 15:
                            codes[k] = (bits & 0x8000) | ((place + 1) << 7) | (bits & 0x7F)
                        elif bits & 0x7FFF == 0:
                            codes[k] = bits
                        else:
                            codes[k] = 0
                            if used == most:
                                return row
                            entries[used] = np.uint32(k) | np.uint32(bits) << np.uint32(16)
                            used += 1
                else:
                    codes[:] = 0
                scales[r] = (lowest - 1 + 127) << 7
                ends[r] = used
                _spread(codes, words, r)
        return -1

    return pack_rows

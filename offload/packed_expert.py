"""Weights of a packed expert as numbers, in torch, wherever its bytes lie: exact in float32.

For devices that play another one, and for steps too rare to deserve a kernel; it takes as long as
some 16 tokens do in the expert.

Shapes: B bytes, F = 2I, H hidden, I expert width, X blocks of 16 rows, N rows, P columns padded to
whole groups, G groups of a row.
"""

import torch

from cpu_kernels.lossless import STEPS, WORDS
from cpu_kernels.packed_layout import BLOCK_ROWS, MatrixShape, PackedShape

SCALES = {"f16": torch.float16, "bf16": torch.bfloat16}
PAIR = 0x87FF87FF - (1 << 32)  # what a word of bf12 has of its own two weights


def dequantised(blob_B: torch.Tensor, shape: PackedShape) -> tuple[torch.Tensor, torch.Tensor]:
    """``(w13_FH, w2_HI)`` in float32, new memory on the device of ``blob_B``."""
    assert blob_B.shape == (shape.expert_bytes,) and blob_B.dtype == torch.uint8
    gate = shape.gate
    both_X2 = blob_B[: shape.w2_offset].view(gate.num_blocks, 2, gate.block_bytes)
    halves = [_matrix(both_X2[:, half], gate) for half in (0, 1)]
    down_X = blob_B[shape.w2_offset :].view(shape.down.num_blocks, shape.down.block_bytes)
    return torch.cat(halves), _matrix(down_X, shape.down).contiguous()


def _matrix(blocks_X: torch.Tensor, shape: MatrixShape) -> torch.Tensor:
    """The float32 matrix of some blocks ``[X, block_bytes]``."""
    kind = shape.kind
    if kind.is_lossless:
        return _lossless(blocks_X, shape)
    weights_NP = _codes(blocks_X[:, : shape.scale_offset], kind.bits).float()
    scale_bytes = blocks_X[:, shape.scale_offset : shape.zero_offset].contiguous()
    scales_NG = _by_row(scale_bytes.view(SCALES[kind.scales])).float()
    weights_NGL = weights_NP.view(len(weights_NP), shape.groups, kind.group)
    if kind.has_zeros:
        end = shape.zero_offset + BLOCK_ROWS * shape.groups
        weights_NGL -= _by_row(blocks_X[:, shape.zero_offset : end])[:, :, None]
    else:
        weights_NGL -= kind.middle
    weights_NGL *= scales_NG[:, :, None]
    return weights_NP[: shape.rows, : shape.cols]


def _lossless(blocks_X: torch.Tensor, shape: MatrixShape) -> torch.Tensor:
    """The same of bf12 blocks (:mod:`cpu_kernels.lossless`)."""
    codes, behind = shape.scale_offset, shape.scale_offset + 32
    words_NS3 = _rows_of_words(blocks_X[:, :codes].contiguous().view(torch.int32))
    first, second, third = words_NS3.unbind(2)
    last = first >> 4 & 0x07800780 | second >> 8 & 0x00780078
    last |= third >> 11 & 0x00070007 | (third & 0x40004000) << 1
    pairs_NS4 = torch.cat([words_NS3, last[:, :, None]], dim=2) & PAIR
    scales_N = blocks_X[:, codes:behind].contiguous().view(torch.bfloat16).flatten()
    weights_NP = pairs_NS4.flatten(1).view(torch.bfloat16).float() * scales_N[:, None].float()
    _put_exceptions(weights_NP, blocks_X[:, behind:])
    return weights_NP[: shape.rows, : shape.cols]


def _rows_of_words(words_XW: torch.Tensor) -> torch.Tensor:
    """Words of bf12 blocks by row and step, ``[N, steps, WORDS]``."""
    groups = words_XW.view(len(words_XW), -1, WORDS, STEPS, BLOCK_ROWS).permute(0, 4, 1, 3, 2)
    return groups.reshape(BLOCK_ROWS * len(words_XW), -1, WORDS)


def _put_exceptions(weights_NP: torch.Tensor, lists_X: torch.Tensor) -> None:
    """Write those of every block, whose ends and entries are ``lists_X``."""
    end_XR = lists_X[:, :32].contiguous().view(torch.int16).int() & 0xFFFF
    entry_XL = lists_X[:, 32:].contiguous().view(torch.int32)
    place_L = torch.arange(entry_XL.shape[1], device=lists_X.device)
    block_E, place_E = (place_L < end_XR[:, -1:]).nonzero(as_tuple=True)
    row_E = block_E * BLOCK_ROWS + (end_XR[block_E] <= place_E[:, None]).sum(1)
    entry_E = entry_XL[block_E, place_E]
    weights_NP[row_E, (entry_E & 0xFFFF).long()] = (entry_E & -0x10000).view(torch.float32)


def _codes(bytes_X: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes ``[N, P]`` of blocks whose steps hold 4 bytes of each of 16 rows."""
    steps_XS164 = bytes_X.reshape(len(bytes_X), -1, BLOCK_ROWS, 4)
    rows_X16S4 = steps_XS164.transpose(1, 2)
    if bits == 8:
        return rows_X16S4.reshape(len(bytes_X) * BLOCK_ROWS, -1)
    # the low nibbles of a step are 4 columns, its high ones the 4 after them
    nibbles_X16S24 = torch.stack((rows_X16S4 & 15, rows_X16S4 >> 4), dim=3)
    return nibbles_X16S24.reshape(len(bytes_X) * BLOCK_ROWS, -1)


def _by_row(values_X: torch.Tensor) -> torch.Tensor:
    """``[N, G]`` of blocks that hold ``[G, 16 rows]``."""
    values_XG16 = values_X.reshape(len(values_X), -1, BLOCK_ROWS)
    return values_XG16.transpose(1, 2).reshape(len(values_X) * BLOCK_ROWS, -1)

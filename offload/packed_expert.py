"""Weights of a packed expert as numbers, in torch, wherever its bytes lie: exact in float32.

For a CPU that plays the GPU, and to look at what is stored; it takes as long as some 16 tokens do
in the expert.

Shapes: B bytes, F = 2I, H hidden, I expert width, X blocks of 16 rows, N rows, P columns padded to
whole groups, G groups of a row.
"""

import torch

from cpu_kernels.packed_layout import BLOCK_ROWS, MatrixShape, PackedShape
from gpu_kernels.lossless_reference import lossless_matrix

SCALES = {"f16": torch.float16, "bf16": torch.bfloat16}


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
        return lossless_matrix(blocks_X, shape.scale_offset)[: shape.rows, : shape.cols]
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

"""Packed experts that are made while they are loaded, a few rows at a time.

A reader thread holds the rows it works on as numbers, never an expert: with 16 threads a whole
one of Mixtral-8x7B each would be 11 GB.

Shapes: B bytes of an expert, N rows, K columns, X blocks of 16 rows.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cpu_kernels.activation_reference import LINEAR_IN_UP
from cpu_kernels.bf16 import U16
from cpu_kernels.lossless import is_finite, pack_lossless
from cpu_kernels.neuron_scales import ColumnExponents, drop_unfit_rows, scaled
from cpu_kernels.packed_layout import (
    BLOCK_ROWS,
    U8,
    MatrixShape,
    PackedShape,
    Quantised,
    pack_matrix,
)
from cpu_kernels.weight_kind import BF12, WeightKind
from fiddler.errors import ConfigError, NumericsError
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import Part, expert_parts, packed_part, packed_shape
from fiddler.models.weights import CheckpointSource, WeightSource
from fiddler.rounding.grid import QUICK_SHRINKS
from fiddler.rounding.matrix import round_matrix

# fill(layer, expert, out_B): write the bytes of one expert into ``out_B``, on its device
FillPacked = Callable[[int, int, Tensor], None]
# Codes of some rows of a matrix of the checkpoint.
RowsOf = Callable[[Part, slice], Quantised]
# Bits of the bfloat16 numbers of some rows.
BitsOf = Callable[[Part, slice], U16]
# Write some rows of a matrix as blocks ``[X, block_bytes]``.
FillBlocks = Callable[[Part, slice, U8], None]

CHUNK = 1 << 21  # weights at a time: 8 MB as float32


def packing(config: ModelConfig, kind: WeightKind, rows_of: RowsOf) -> FillPacked:
    """Make experts of the codes that ``rows_of`` gives; it may be called by several threads."""

    def fill_blocks(part: Part, rows: slice, blocks_X: U8) -> None:
        blocks_X[:] = pack_matrix(kind, *rows_of(part, rows))

    return _in_blocks(config, kind, fill_blocks)


def _in_blocks(config: ModelConfig, kind: WeightKind, fill_blocks: FillBlocks) -> FillPacked:
    shape = packed_shape(config, kind)

    def fill(layer: int, expert: int, out_B: Tensor) -> None:
        is_host = out_B.device.type == "cpu"
        blob_B = out_B.numpy() if is_host else np.empty(shape.expert_bytes, np.uint8)
        for part, (matrix, blocks) in zip(
            expert_parts(config, layer, expert), halves(shape, blob_B), strict=True
        ):
            for rows in _chunks(matrix):
                first, last = rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS)
                fill_blocks(part, rows, blocks[first:last])
        if not is_host:
            out_B.copy_(torch.from_numpy(blob_B))

    return fill


def _chunks(matrix: MatrixShape) -> Iterator[slice]:
    step = max(1, CHUNK // matrix.cols // BLOCK_ROWS) * BLOCK_ROWS
    for first in range(0, matrix.rows, step):
        yield slice(first, min(first + step, matrix.rows))


def rounding(source: WeightSource, config: ModelConfig, kind: WeightKind) -> FillPacked:
    """Round the numbers of ``source``, whose sides the kind's groups divide."""

    def rows_of(part: Part, rows: slice) -> Quantised:
        w_NK = source.tensor(part.name, part.shape)[rows].float().numpy()
        if not np.isfinite(w_NK.max() - w_NK.min()):
            raise NumericsError(f"tensor {part.name} holds NaN or Inf")
        try:
            found = round_matrix(w_NK, kind, shrinks=QUICK_SHRINKS[kind.bits])
        except ValueError as error:
            hint = f"load it with --dtype {kind.name}-bf16"
            raise ConfigError(f"tensor {part.name}: {error}", hint=hint) from error
        if rows.stop == part.shape[0]:
            source.forget(part.name)
        return found

    return packing(config, kind, rows_of)


def lossless(config: ModelConfig, bits_of: BitsOf) -> FillPacked:
    """Pack bfloat16 numbers as bf12; ``bits_of`` may be called by several threads.

    Neurons that are far smaller than the others are scaled (:mod:`cpu_kernels.neuron_scales`),
    unless the activation would not bear it: then they may have no room.
    """
    may_scale = config.activation in LINEAR_IN_UP
    shape = packed_shape(config, BF12)

    def fill(layer: int, expert: int, out_B: Tensor) -> None:
        _, up, down = expert_parts(config, layer, expert)
        exponents = ColumnExponents(shape.width)
        for rows in _chunks(shape.down) if may_scale else ():
            exponents.add(bits_of(down, rows))
        shift_I = exponents.shifts()

        def fill_blocks(part: Part, rows: slice, blocks_X: U8) -> None:
            w_NK = bits_of(part, rows)
            if part == up:
                drop_unfit_rows(w_NK, shift_I[rows])
                w_NK = scaled(w_NK, shift_I[rows, None])
            elif part == down:
                w_NK = scaled(w_NK, -shift_I)
            _pack_bits(part, w_NK, blocks_X)

        _in_blocks(config, BF12, fill_blocks)(layer, expert, out_B)

    return fill


def _pack_bits(part: Part, w_NK: U16, blocks_X: U8) -> None:
    try:
        pack_lossless(w_NK, blocks_X)
    except ValueError as error:
        if not is_finite(w_NK):
            raise NumericsError(f"tensor {part.name} holds NaN or Inf") from error
        raise ConfigError(
            f"tensor {part.name} has no room in 12 bits: {error}",
            hint="load it with --dtype bfloat16",
        ) from error


def stored_bits(source: WeightSource) -> BitsOf:
    """Those of a checkpoint; numbers of other types are rounded to bfloat16."""

    def bits_of(part: Part, rows: slice) -> U16:
        w_NK = source.tensor(part.name, part.shape)[rows].bfloat16()
        if rows.stop == part.shape[0]:
            source.forget(part.name)
        return w_NK.view(torch.int16).numpy().view(np.uint16)

    return bits_of


def stored(source: CheckpointSource, config: ModelConfig, kind: WeightKind) -> FillPacked:
    """Copy experts that the checkpoint holds in packed bytes of ``kind``, or each layer's own."""

    def fill(layer: int, expert: int, out_B: Tensor) -> None:
        shape = packed_shape(config, config.packed_kind(kind, layer))
        source.fill_packed_(out_B, packed_part(config, kind, layer, expert).name, shape)

    return fill


def halves(shape: PackedShape, blob_B: U8) -> tuple[tuple[MatrixShape, U8], ...]:
    """Gate, up and down as views ``[X, block_bytes]`` of an expert's bytes."""
    gate, down = shape.gate, shape.down
    both_X2 = blob_B[: shape.w2_offset].reshape(gate.num_blocks, 2, gate.block_bytes)
    down_X = blob_B[shape.w2_offset :].reshape(down.num_blocks, down.block_bytes)
    return (gate, both_X2[:, 0]), (gate, both_X2[:, 1]), (down, down_X)

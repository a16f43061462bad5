"""Seeded bytes of packed experts, made in place: nothing is drawn that would then be rounded.

Every pattern of codes is as likely as another, and scales make the weights as large as those of
:class:`fiddler.models.dummy.DummySource`. Their signs are drawn too: codes of -8..7 have a mean.

Shapes: B bytes of an expert, X blocks of 16 rows.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from cpu_kernels.packed_layout import BLOCK_ROWS, U8, MatrixShape, encode_scales
from cpu_kernels.seeded_table import LEVELS, fill_from_table
from cpu_kernels.weight_kind import WeightKind
from fiddler.models.config import ModelConfig
from fiddler.models.dummy import DummySource
from fiddler.models.manifest import expert_parts, packed_shape
from fiddler.models.packing import FillPacked, halves, lossless


def dummy_packing(source: DummySource, config: ModelConfig, kind: WeightKind) -> FillPacked:
    """Random experts of ``kind``, or each layer's own, the same ones for the same seed.

    Those of bf12 are those of bfloat16.
    """
    if kind.is_lossless:
        return lossless(config, lambda part, rows: source.bits(part.name, part.shape, rows))

    def fill(layer: int, expert: int, out_B: Tensor) -> None:
        shape = packed_shape(config, config.packed_kind(kind, layer))
        is_host = out_B.device.type == "cpu"
        blob_B = out_B.numpy() if is_host else np.empty(shape.expert_bytes, np.uint8)
        parts = expert_parts(config, layer, expert)
        # all of it once, for a block's bytes are no array of their own; then what is no code
        fill_from_table(blob_B.view(np.uint32), _codes(), source.key(f"{parts[0].name}.packed"), 0)
        for part, (matrix, blocks_X) in zip(parts, halves(shape, blob_B), strict=True):
            _, std = source.moments(part.name, part.shape)
            _scale(blocks_X, matrix, std, source.key(f"{part.name}.scales"))
        if not is_host:
            out_B.copy_(torch.from_numpy(blob_B))

    return fill


def _scale(blocks_X: U8, matrix: MatrixShape, std: float, key: np.uint64) -> None:
    """Write scales and zero points; rows and columns beyond the matrix do not matter here."""
    kind, per_block = matrix.kind, BLOCK_ROWS * matrix.groups
    scales = np.empty(len(blocks_X) * per_block, np.uint16)
    fill_from_table(scales, _scales(kind, std), key, 0)
    at = slice(matrix.scale_offset, matrix.zero_offset)
    blocks_X[:, at] = scales.view(np.uint8).reshape(len(blocks_X), -1)
    if kind.has_zeros:
        blocks_X[:, matrix.zero_offset : matrix.zero_offset + per_block] = kind.middle


@functools.cache
def _codes() -> np.ndarray:
    """Patterns of eight or four codes."""
    return np.random.default_rng(0).integers(0, 1 << 32, LEVELS, dtype=np.uint32)


@functools.cache
def _scales(kind: WeightKind, std: float) -> np.ndarray:
    """Bits of scales that give even codes the standard deviation ``std``, up to 20 % away."""
    codes = np.arange(kind.max_code + 1) - kind.middle
    size = std / np.sqrt(np.mean(codes.astype(np.float64) ** 2))
    spread = np.linspace(0.8, 1.2, LEVELS) * np.where(np.arange(LEVELS) % 2, 1, -1)
    return encode_scales(size * spread, kind.scales)

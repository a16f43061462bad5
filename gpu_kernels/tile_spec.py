"""What a program of the expert kernels is compiled for: the matrix and the tile.

One frozen value per launch instead of twenty compile-time arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton.language as tl

from gpu_kernels.device import family
from gpu_kernels.expert_weights import Activation, DenseWeights, ExpertLayer

Matrix = Literal["w13", "w2"]


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Sizes that decide speed, and nothing else apart from the order of some sums.

    A program computes two tiles of ``rows`` weight rows for ``columns`` tokens, ``depth`` elements
    at a time. ``in_registers`` is for products by mma: packed codes go from the registers in which
    they were decoded into the product, exactly, and are scaled after it. Otherwise (wgmma) they are
    scaled first, in x's dtype; bf12 always is, exactly.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    in_registers: bool = False
    near: int = 8  # many tokens: tiles of columns that share a weight tile at a time
    splits: int = 1  # few tokens, w2: parts of the depth with a program each

    def __post_init__(self) -> None:
        assert self.rows % 16 == 0 and self.depth % 16 == 0 and self.columns >= 8
        for size in (self.rows, self.columns, self.depth, self.num_warps):
            assert size > 0 and size & (size - 1) == 0, "powers of two"

    @property
    def launch(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class TileSpec:
    """A :class:`TileConfig` and the matrix it is used on, for kernels.

    ``paired`` is w13: the two tiles are gate rows and the same rows of up. ``rows`` are those of
    gate, or of w2. ``bits`` is 0 for dense weights, and what belongs to packed ones is then 0 too.
    ``unit``: 0, or only the last rows of w13 (columns of w2) are computed, from one on that is
    known when the kernel runs, a multiple of ``unit``. ``waits``: decoded weights enter wgmma from
    registers, which must not be written before it is done.
    """

    paired: bool
    rows: int
    depth: int
    tile_rows: int
    columns: int
    step: int
    in_registers: bool
    activation: Activation
    splits: int = 1
    unit: int = 0
    bits: int = 0
    group: int = 0
    has_zeros: bool = False
    scale_dtype: Any = None
    block_bytes: int = 0
    scale_offset: int = 0
    zero_offset: int = 0
    waits: bool = False

    @property
    def is_ragged(self) -> bool:
        """Whether the last step of the depth may end beyond the matrix."""
        return self.depth % self.step != 0 or (self.unit != 0 and not self.paired)

    def num_tiles(self, rows: int) -> int:
        """Programs for so many rows of each expert."""
        return -(-rows // (self.tile_rows if self.paired else 2 * self.tile_rows))


def tile_spec(layer: ExpertLayer, matrix: Matrix, config: TileConfig, unit: int = 0) -> TileSpec:
    """The spec of one matrix of the layer; the same arguments give equal specs."""
    weights = layer.weights
    paired = matrix == "w13"
    rows, depth = (layer.width, layer.hidden) if paired else (layer.hidden, layer.width)
    packed: dict[str, Any] = {}
    if not isinstance(weights, DenseWeights):
        layout = weights.layout
        is_f16 = layout.scale_dtype == torch.float16
        packed = {
            "bits": layout.bits,
            "group": layout.group,
            "has_zeros": layout.has_zeros,
            "scale_dtype": tl.float16 if is_f16 else tl.bfloat16,
            "block_bytes": layout.block_bytes(depth),
            "scale_offset": layout.scale_offset(depth),
            "zero_offset": layout.zero_offset(depth),
            "waits": not config.in_registers and family(layer.device) == "sm90",
        }
    return TileSpec(
        paired=paired,
        rows=rows,
        depth=depth,
        tile_rows=config.rows,
        columns=config.columns,
        step=config.depth,
        in_registers=config.in_registers,
        activation=layer.activation,
        splits=config.splits,
        unit=unit,
        **packed,
    )

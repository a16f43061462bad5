"""Which tile sizes the expert kernels use: the one place to tune.

Chosen from the compiled code (registers, instructions per weight), not yet from times. float32
has no tensor cores here and is for comparisons only: small tiles, so that it compiles in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_kernels.expert_weights import DenseWeights, ExpertLayer
from gpu_kernels.tile_spec import TileConfig


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """Tiles of the two launches."""

    gate_up: TileConfig
    down: TileConfig


def decode_config(layer: ExpertLayer, num_tokens: int, dtype: torch.dtype) -> ExpertConfig:
    """Tiles for up to 32 tokens.

    Only ``columns`` may depend on ``num_tokens``: the order of sums must not.
    """
    columns = 8 if num_tokens <= 8 else 16 if num_tokens <= 16 else 32
    if dtype == torch.float32:
        tile = TileConfig(16, columns, 32, num_warps=4, num_stages=2, in_registers=True)
    else:
        tile = TileConfig(16, columns, 128, num_warps=1, num_stages=4, in_registers=True)
    return ExpertConfig(tile, tile)


def prefill_config(layer: ExpertLayer, num_pairs: int, dtype: torch.dtype) -> ExpertConfig:
    """Tiles for ``num_pairs`` pairs spread over the slots."""
    per_slot = num_pairs / layer.num_slots
    is_dense = isinstance(layer.weights, DenseWeights)
    if dtype == torch.float32:
        tile = TileConfig(32, 32, 32, num_warps=4, num_stages=2)
    elif per_slot <= 16:  # bound by the weights' bytes
        tile = TileConfig(32, 16, 128, num_warps=2, num_stages=4, in_registers=True)
    elif not _has_wgmma(layer.device):
        tile = TileConfig(64, 64, 64, num_warps=4, num_stages=3, in_registers=not is_dense)
    elif per_slot <= 64:
        tile = TileConfig(64, 64, 64, num_warps=4, num_stages=4 if is_dense else 3)
    elif is_dense:
        tile = TileConfig(128, 128, 64, num_warps=8, num_stages=4)
    else:
        tile = TileConfig(64, 128, 64, num_warps=4, num_stages=3)
    return ExpertConfig(tile, tile)


def _has_wgmma(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9

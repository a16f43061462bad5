"""Which tiles the expert kernels use, from the table of measured ones.

float32 has no tensor cores here and is for comparisons: small tiles, so that it compiles soon.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from gpu_kernels.device import family
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer
from gpu_kernels.tile_spec import TileConfig
from gpu_kernels.tuned import Config, choose


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """Tiles of the two launches."""

    gate_up: TileConfig
    down: TileConfig


def decode_config(layer: ExpertLayer, num_tokens: int, dtype: torch.dtype) -> ExpertConfig:
    """Tiles for up to 32 tokens.

    Only ``columns`` depends on ``num_tokens``: the order of sums must not.
    """
    columns = 8 if num_tokens <= 8 else 16 if num_tokens <= 16 else 32
    gpu, bits = family(layer.device), _bits(layer, dtype)
    gate_up, down = (
        TileConfig(
            columns=columns, in_registers=True, **choose(kernel, gpu, bits=bits, depth=depth)
        )
        for kernel, depth in (("expert_gate_up", layer.hidden), ("expert_down", layer.width))
    )
    return ExpertConfig(gate_up, down)


def prefill_config(layer: ExpertLayer, num_pairs: int, dtype: torch.dtype) -> ExpertConfig:
    """Tiles for ``num_pairs`` pairs spread over the slots."""
    per_slot = -(-num_pairs // layer.num_slots)
    gpu, bits = family(layer.device), _bits(layer, dtype)
    return _prefill_config(gpu, bits, per_slot, layer.hidden, layer.width)


@lru_cache  # asked for before each launch
def _prefill_config(gpu: str, bits: int, per_slot: int, *depths: int) -> ExpertConfig:
    sizes = {"bits": bits, "per_slot": per_slot}
    gate_up, down = (
        _prefill_tile(choose("grouped_experts", gpu, **sizes, depth=depth)) for depth in depths
    )
    return ExpertConfig(gate_up, down)


def _prefill_tile(chosen: Config) -> TileConfig:
    sizes = dict(chosen)
    return TileConfig(in_registers=bool(sizes.pop("in_registers")), **sizes)


def _bits(layer: ExpertLayer, dtype: torch.dtype) -> int:
    """Of a weight; 32: products in float32, whatever the weights are."""
    weights = layer.weights
    if dtype == torch.float32:
        return 32
    return 16 if isinstance(weights, DenseWeights) else weights.layout.bits

"""Rotary position embedding: inverse frequencies of the known scalings, and their tables.

Legend: S positions, D head dim (tables have D/2 columns; the halves of a head rotate as pairs).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fiddler.errors import ConfigError
from fiddler.models.config import ModelConfig


def rope_tables(config: ModelConfig, max_len: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 ``[max_len, D/2]``, attention factor included."""
    kind = config.rope_scaling.get("rope_type", "default")
    if kind == "dynamic" and max_len > config.max_position:
        # beyond it the frequencies would follow the length and turn cached keys stale
        raise ConfigError(
            f"dynamic RoPE ends at {config.max_position} tokens here, {max_len} were asked for",
            hint=f"use at most {config.max_position} tokens",
        )
    inv_freq, factor = inverse_frequencies(config)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * inv_freq
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return each pair's angle per position, float32 ``[D/2]``, and the factor on cos and sin."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    plain = 1.0 / torch.pow(config.rope_theta, exponents)
    scaling = config.rope_scaling
    match scaling.get("rope_type", "default"):
        case "linear":
            return plain / scaling["factor"], 1.0
        case "llama3":
            return _llama3(plain, scaling), 1.0
        case "yarn":
            return _yarn(plain, config), _yarn_attention_factor(scaling)
        case kind:
            assert kind in ("default", "dynamic"), kind  # dynamic: plain up to max_position
            return plain, 1.0


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Divide long wavelengths by the factor, keep short ones, blend those between."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    return _blend(plain, kept, scaling["factor"])


def _yarn(plain: Tensor, config: ModelConfig) -> Tensor:
    """Keep pairs that turn often within the original context, interpolate those that do not."""
    scaling, dim = config.rope_scaling, config.head_dim
    original = scaling["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_with(scaling.get("beta_fast", 32)), pair_with(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0.0), min(last, dim - 1.0)
    width = last - first or 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32)
    return _blend(plain, 1 - ((pairs - first) / width).clamp(0, 1), scaling["factor"])


def _blend(plain: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Keep a share of each frequency and divide the rest by ``factor``."""
    return plain * kept + plain / factor * (1 - kept)


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(max(scaling["factor"], 1.0)) + 1.0

    weight, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(weight) / grown(all_dim) if weight and all_dim else grown(1.0)

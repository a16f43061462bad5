"""Settings and logits for the tests of sampling, one row per request.

Shapes: B requests, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from paged_batch import DEVICE
from torch import Tensor

from gpu_kernels.sampling import SamplingSettings

DEFAULTS: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "position": 0,
}
DTYPES = {"top_k": torch.int32, "seed": torch.int64, "position": torch.int64}


def make_settings(rows: Sequence[dict[str, Any]]) -> SamplingSettings:
    """Settings of requests that name what differs from the defaults."""

    def column(name: str) -> Tensor:
        values = [(DEFAULTS | row)[name] for row in rows]
        return torch.tensor(values, dtype=DTYPES.get(name, torch.float32), device=DEVICE)

    return SamplingSettings(*(column(name) for name in DEFAULTS))


def seeded(row: dict[str, Any], num: int) -> list[dict[str, Any]]:
    """``num`` requests that differ in their seeds only."""
    return [row | {"seed": seed} for seed in range(num)]


def make_logits(num: int, vocab: int, *, spread: float = 3.0, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(num, vocab, generator=rng)).to(DEVICE)

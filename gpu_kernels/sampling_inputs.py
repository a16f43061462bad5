"""What a draw takes besides logits: settings of each request, all of them data on the device.

Nothing here is read by the host, so a captured CUDA graph sees whatever the tensors hold at replay.
Shapes: B requests, V vocabulary, S slots of counts, N biased tokens, P vocabulary padded to whole
tiles, T tiles, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How a row is cut. Which tokens are kept depends on these only by the rounding of sums, and which
# one is drawn not at all; so they are constants, whatever the GPU.
TILE = 2048  # tokens of one program of the pass over the vocabulary
GROUP = 128  # tokens with a common maximum: what can be kept is looked for in whole groups
GREEDY_BELOW = 1e-5  # a temperature as good as 0: dividing by less would overflow
COUNT_MASK = 0x7FFF  # where ``token_counts`` counts outputs; the sign bit stands for the prompt


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Settings ``[B]`` in the meaning of vLLM's names; a request's defaults are in brackets.

    ``temperature_B`` below 1e-5 is greedy. ``top_k_B`` [0] counts below 1 or from V on as no limit,
    ``top_p_B`` [1] from 1 on, ``min_p_B`` [0] up to 0. ``position_B`` is the index of the token to
    be drawn in its sequence; a draw depends on seed and position, so each of several samples of one
    prompt has a seed of its own.
    """

    temperature_B: Tensor  # float32
    top_k_B: Tensor  # int32
    top_p_B: Tensor  # float32
    min_p_B: Tensor  # float32
    seed_B: Tensor  # int64
    position_B: Tensor  # int64

    def __post_init__(self) -> None:
        shape = self.temperature_B.shape
        _check(torch.float32, shape, self.temperature_B, self.top_p_B, self.min_p_B)
        _check(torch.int32, shape, self.top_k_B)
        _check(torch.int64, shape, self.seed_B, self.position_B)


@dataclass(frozen=True, slots=True)
class Penalties:
    """Penalties ``[B]`` and the rows of ``counts_SV`` (see ``token_counts``) that they go by.

    ``slot_B`` is -1 for a request without penalties: its other values are not looked at.
    """

    repetition_B: Tensor  # float32 [1]
    presence_B: Tensor  # float32 [0]
    frequency_B: Tensor  # float32 [0]
    slot_B: Tensor  # int32
    counts_SV: Tensor  # int16

    def __post_init__(self) -> None:
        shape = self.slot_B.shape
        _check(torch.float32, shape, self.repetition_B, self.presence_B, self.frequency_B)
        _check(torch.int32, shape, self.slot_B)
        assert self.counts_SV.dtype == torch.int16 and self.counts_SV.stride(1) == 1


@dataclass(frozen=True, slots=True)
class LogitBias:
    """What is added to logits: request b's list ends before the first negative id of ``ids_BN[b]``.

    A token in the list twice gets both values. -inf bans a token, as ``min_tokens`` does with those
    that would end the text. An id beyond the vocabulary has no effect.
    """

    ids_BN: Tensor  # int32
    values_BN: Tensor  # float32

    def __post_init__(self) -> None:
        _check(torch.int32, self.ids_BN.shape, self.ids_BN)
        _check(torch.float32, self.ids_BN.shape, self.values_BN)


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """Memory that a draw overwrites, about 4 bytes per logit; made once for the largest batch."""

    scaled_BP: Tensor  # float32 adjusted logits / temperature; -inf beyond V
    winner_BT: Tensor  # int64, a tile's best token and its score, packed
    tile_max_BT: Tensor  # float32 of scaled
    tile_sum_BT: Tensor  # float32, sum of exp(scaled - tile_max)
    group_max_BG: Tensor  # float32 of scaled
    listed_BG: Tensor  # int32, groups in which kept tokens can be

    @classmethod
    def for_batch(cls, batch: int, vocab: int, device: torch.device | str) -> SamplingScratch:
        tiles = -(-vocab // TILE)
        groups = tiles * (TILE // GROUP)

        def new(columns: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((batch, columns), dtype=dtype, device=device)

        return cls(
            new(tiles * TILE, torch.float32),
            new(tiles, torch.int64),
            new(tiles, torch.float32),
            new(tiles, torch.float32),
            new(groups, torch.float32),
            new(groups, torch.int32),
        )

    def check(self, batch: int, vocab: int, device: torch.device) -> None:
        """Assert that a draw of this size fits."""
        rows, tiles = self.winner_BT.shape
        assert rows >= batch and tiles == -(-vocab // TILE)
        assert self.scaled_BP.shape == (rows, tiles * TILE)
        assert self.scaled_BP.device == device


def _check(dtype: torch.dtype, shape: torch.Size, *tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()

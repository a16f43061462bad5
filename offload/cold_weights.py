"""Memory for the experts that the CPU computes, as its kernels and as torch see it.

Shapes: C experts, F = 2I, H hidden, I expert width, B bytes of a packed expert.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpu_kernels.arena import Arena
from cpu_kernels.experts import Experts, dense_experts, packed_experts
from cpu_kernels.packed_layout import PackedShape

NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.bfloat16: np.dtype(np.uint16),
    torch.float32: np.dtype(np.float32),
}
LINE = 64  # bytes of a cache line


@dataclass(frozen=True, slots=True)
class ColdWeights:
    """Weights of one layer: the tensors are views of what ``experts`` points to.

    All of it lies in ``num_bytes`` from ``address`` on, which begins a page. Packed experts are one
    row of ``blob_CB`` each; their ``w13`` and ``w2`` are the bytes of either.
    """

    experts: Experts
    w13_CFH: torch.Tensor
    w2_CHI: torch.Tensor
    address: int
    num_bytes: int
    blob_CB: torch.Tensor | None = None


def cold_weights(
    num_experts: int, hidden_size: int, expert_size: int, dtype: torch.dtype
) -> ColdWeights:
    """Room for ``num_experts`` (at least 1) of bfloat16 or float32, zeros, in huge pages.

    It lives as long as the result, or a tensor of it.
    """
    kind = NUMPY_DTYPES[dtype]
    w13_shape = num_experts, 2 * expert_size, hidden_size
    w2_shape = num_experts, hidden_size, expert_size
    half = num_experts * hidden_size * expert_size * kind.itemsize
    w2_begin = -(-2 * half // LINE) * LINE
    arena = Arena(w2_begin + half)
    w13_CFH, w2_CHI = arena.array(kind, w13_shape), arena.array(kind, w2_shape, w2_begin)
    return ColdWeights(
        dense_experts(w13_CFH, w2_CHI),
        _tensor(w13_CFH),
        _tensor(w2_CHI),
        arena.address,
        arena.nbytes,
    )


def cold_packed(num_experts: int, shape: PackedShape) -> ColdWeights:
    """The same for packed experts."""
    arena = Arena(num_experts * shape.expert_bytes)
    blob_CB = arena.array(np.uint8, (num_experts, shape.expert_bytes))
    blob = torch.from_numpy(blob_CB)
    return ColdWeights(
        packed_experts(blob_CB, shape),
        blob[:, : shape.w2_offset],
        blob[:, shape.w2_offset :],
        arena.address,
        arena.nbytes,
        blob,
    )


def _tensor(weights: np.ndarray) -> torch.Tensor:
    """A view; uint16 are the bits of bfloat16."""
    if weights.dtype == np.uint16:
        return torch.from_numpy(weights.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(weights)

"""Expert weights of named shapes for benchmarks: an arena several times the last-level cache."""

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from cpu_kernels.arena import Arena
from cpu_kernels.experts import Experts
from cpu_kernels.weight_kind import WeightKind
from offload.sample_experts import sample_bytes, sample_experts

LEAST_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's expert layer: experts held and routed per token, hidden, expert width."""

    name: str
    experts: int
    routed: int
    hidden: int
    width: int

    @property
    def elements(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.width

    @property
    def arena_bytes(self) -> int:
        """Enough for any kind of :func:`fill_experts`, float32 left out."""
        return max(LEAST_BYTES, 2 * self.experts * self.elements) + 4 * self.elements


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral-8x7b", 8, 2, 4096, 14336),
        Shape("qwen3-30b-a3b", 128, 8, 2048, 768),
    )
}


def fill_experts(
    arena: Arena, shape: Shape, kind: WeightKind, num_experts: int | None = None
) -> tuple[Experts, npt.NDArray[Any]]:
    """Normal weights of a kind at the arena's start, and the bytes that they take.

    None: as many experts as fill 2 GiB, at least those of the shape and whole sets of the routed.
    """
    expert_bytes = sample_bytes(kind, shape.hidden, shape.width)
    if num_experts is None:
        sets = max(shape.experts * expert_bytes, LEAST_BYTES) // (shape.routed * expert_bytes)
        num_experts = sets * shape.routed
    return sample_experts(arena, kind, shape.hidden, shape.width, num_experts)

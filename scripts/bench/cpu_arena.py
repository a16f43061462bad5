"""Expert weights of named shapes for benchmarks: an arena several times the last-level cache."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.arena import Arena
from cpu_kernels.bf16 import f32_to_bf16
from cpu_kernels.experts import Experts, dense_experts, packed_experts
from cpu_kernels.packed_layout import MatrixShape, PackedShape, pack_matrix
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import WeightKind

LEAST_BYTES = 2 << 30
NUM_BLOCKS = 8  # different blocks of 16 rows; the arena repeats them


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
    One random piece is repeated: filling gigabytes otherwise takes minutes.
    """
    packed = PackedShape(kind, shape.hidden, shape.width) if kind.is_packed else None
    expert_bytes = packed.expert_bytes if packed else shape.elements * kind.bits // 8
    if num_experts is None:
        sets = max(shape.experts * expert_bytes, LEAST_BYTES) // (shape.routed * expert_bytes)
        num_experts = sets * shape.routed
    used = arena.array(np.dtype(np.uint8), (num_experts, expert_bytes), 0)
    if packed:
        used[:] = _packed_expert(packed)
        return packed_experts(used, packed), used
    assert kind.codes == "bf16", kind
    values = used.view(np.uint16).reshape(-1)
    block = _normal_bf16(1 << 20)
    for at in range(0, values.size, block.size):
        values[at : at + block.size] = block[: values.size - at]
    half = num_experts * 2 * shape.width * shape.hidden
    w13_EFH = values[:half].reshape(num_experts, 2 * shape.width, shape.hidden)
    w2_EHI = values[half:].reshape(num_experts, shape.hidden, shape.width)
    return dense_experts(w13_EFH, w2_EHI), used


def _normal_bf16(size: int) -> npt.NDArray[np.uint16]:
    """Random bits would be full of denormals, which cost far more than other numbers."""
    rng = np.random.default_rng(0)
    return f32_to_bf16(rng.standard_normal(size, np.float32) / np.float32(64))


def _packed_expert(packed: PackedShape) -> npt.NDArray[np.uint8]:
    def blocks(shape: MatrixShape, count: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((16 * NUM_BLOCKS, shape.cols), np.float32) / np.float32(64)
        some = pack_matrix(packed.kind, *round_to_nearest(weights, packed.kind))
        return np.resize(some, (count, shape.block_bytes)).reshape(-1)

    w13 = blocks(packed.gate, 2 * packed.gate.num_blocks)
    return np.concatenate([w13, blocks(packed.down, packed.down.num_blocks)])

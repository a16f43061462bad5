"""Expert weights to measure kernels with, made in a moment: one random piece, repeated.

Random bits would be full of denormals, which cost far more than other numbers; drawing every one
of some 10^9 normal numbers would take minutes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.arena import Arena
from cpu_kernels.bf16 import f32_to_bf16
from cpu_kernels.experts import Experts, dense_experts, packed_experts
from cpu_kernels.lossless import lossless_blocks
from cpu_kernels.packed_layout import MatrixShape, PackedShape, pack_matrix
from cpu_kernels.quantise import round_to_nearest
from cpu_kernels.weight_kind import WeightKind

NUM_BLOCKS = 8  # different blocks of 16 rows; the arena repeats them


def sample_bytes(kind: WeightKind, hidden: int, width: int) -> int:
    """Of one expert, in bf16 or packed."""
    if kind.is_packed:
        return PackedShape(kind, hidden, width).expert_bytes
    return 3 * hidden * width * kind.bits // 8


def sample_experts(
    arena: Arena, kind: WeightKind, hidden: int, width: int, num_experts: int
) -> tuple[Experts, npt.NDArray[Any]]:
    """Normal weights of a kind (bf16 or packed) at the arena's start, and the bytes they take."""
    used = arena.array(np.dtype(np.uint8), (num_experts, sample_bytes(kind, hidden, width)), 0)
    if kind.is_packed:
        packed = PackedShape(kind, hidden, width)
        used[:] = _packed_expert(packed)
        return packed_experts(used, packed), used
    assert kind.codes == "bf16", kind
    values = used.view(np.uint16).reshape(-1)
    block = _normal_bf16(1 << 20)
    for at in range(0, values.size, block.size):
        values[at : at + block.size] = block[: values.size - at]
    half = num_experts * 2 * width * hidden
    w13_EFH = values[:half].reshape(num_experts, 2 * width, hidden)
    w2_EHI = values[half:].reshape(num_experts, hidden, width)
    return dense_experts(w13_EFH, w2_EHI), used


def _normal_bf16(size: int) -> npt.NDArray[np.uint16]:
    rng = np.random.default_rng(0)
    return f32_to_bf16(rng.standard_normal(size, np.float32) / np.float32(64))


def _blocks(kind: WeightKind, weights_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    if kind.is_rounded:
        return pack_matrix(kind, *round_to_nearest(weights_NK, kind))
    return lossless_blocks(f32_to_bf16(weights_NK))


def _packed_expert(packed: PackedShape) -> npt.NDArray[np.uint8]:
    def blocks(shape: MatrixShape, count: int) -> npt.NDArray[np.uint8]:
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((16 * NUM_BLOCKS, shape.cols), np.float32) / np.float32(64)
        some = _blocks(packed.kind, weights)
        return np.resize(some, (count, shape.block_bytes)).reshape(-1)

    w13 = blocks(packed.gate, 2 * packed.gate.num_blocks)
    return np.concatenate([w13, blocks(packed.down, packed.down.num_blocks)])

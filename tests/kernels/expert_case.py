"""Random expert layers in slots, routings with experts that are not resident, and the answer.

The oracle is the float64 layer of the CPU kernels on the same weights; it never sees a slot.
Shapes: T tokens, K choices, E experts, S slots, H hidden, I width, F = 2I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from paged_batch import DEVICE
from torch import Tensor

from cpu_kernels.bf16 import F32, U16, bf16_to_f32, f32_to_bf16
from cpu_kernels.lossless import pack_lossless
from cpu_kernels.packed_layout import (
    MatrixShape,
    PackedShape,
    decode_scales,
    dequantise,
    encode_scales,
    pack_expert,
)
from cpu_kernels.packed_layout import Quantised as Matrix
from cpu_kernels.packed_reference import dense_layer_reference
from cpu_kernels.weight_kind import BF12, WeightKind, parse_kind
from gpu_kernels.expert_weights import (
    Activation,
    DenseWeights,
    ExpertLayer,
    PackedLayout,
    PackedWeights,
)

# Every pair of two of: codes, group, zero points, type of the scales; and the lossless kind.
KINDS = ("w4g32z", "w4g64z-bf16", "w4g128", "w8g32-bf16", "w8g64", "w8g128z-bf16", "bf12")


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and one step; ``w13_SFH`` and ``w2_SHI`` are the layer's weights in float64."""

    layer: ExpertLayer
    w13_SFH: Any
    w2_SHI: Any
    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    slot_E: Tensor

    @property
    def step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_TH, self.ids_TK, self.weights_TK, self.slot_E

    def run(self, kernel: Callable[..., Tensor], **options: Any) -> Tensor:
        return kernel(*self.step, self.layer, **options)

    def tokens(self, chosen: Any) -> Case:
        """The step of these tokens alone."""
        x_TH, ids_TK, weights_TK = (
            t[chosen].contiguous() for t in (self.x_TH, self.ids_TK, self.weights_TK)
        )
        return replace(self, x_TH=x_TH, ids_TK=ids_TK, weights_TK=weights_TK)

    def expected(self) -> Tensor:
        """float64 ``[T, H]``."""
        slot_TK = self.slot_E[self.ids_TK.clamp(min=0).long()].masked_fill(self.ids_TK < 0, -1)
        b13_SF, b2_SH = (
            None if bias is None else bias.double().cpu().numpy()
            for bias in (self.layer.b13_SF, self.layer.b2_SH)
        )
        out_TH = dense_layer_reference(
            self.w13_SFH,
            self.w2_SHI,
            self.x_TH.float().cpu().numpy(),
            slot_TK.cpu().numpy(),
            self.weights_TK.cpu().numpy(),
            activation=self.layer.activation.kind,
            b13_EF=b13_SF,
            b2_EH=b2_SH,
        )
        return torch.from_numpy(out_TH).to(DEVICE)


def make_case(
    kind: str,
    *,
    num_tokens: int = 3,
    top_k: int = 2,
    hidden: int = 72,
    width: int = 40,
    num_slots: int = 3,
    num_experts: int = 5,
    activation: str = "silu",
    biased: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A case of ``dense`` weights or of a packed kind; one in eight choices is -1."""
    rng = np.random.default_rng(seed)
    make = {"dense": _dense, "bf12": _lossless}.get(kind, _packed)
    weights, w13_SFH, w2_SHI = make(rng, kind, num_slots, hidden, width, dtype)
    b13_SF, b2_SH = _normal(rng, num_slots, 2 * width), _normal(rng, num_slots, hidden)
    layer = ExpertLayer(
        weights,
        Activation(activation),  # type: ignore[arg-type]
        b13_SF.to(DEVICE) if biased else None,
        b2_SH.to(DEVICE) if biased else None,
    )
    top_k = min(top_k, num_experts)
    ids_TK = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(max(num_tokens, 1))])
    ids_TK = np.where(rng.random(ids_TK.shape) < 0.125, -1, ids_TK)[:num_tokens]
    slot_E = np.full(num_experts, -1)
    slot_E[rng.permutation(num_experts)[:num_slots]] = rng.permutation(num_slots)
    return Case(
        layer,
        w13_SFH,
        w2_SHI,
        _normal(rng, max(num_tokens, 1), hidden)[:num_tokens].to(DEVICE, dtype),
        torch.from_numpy(ids_TK).to(DEVICE, torch.int32),
        torch.from_numpy(rng.random(ids_TK.shape, np.float32)).to(DEVICE),
        torch.from_numpy(slot_E).to(DEVICE, torch.int32),
    )


def packed_layout(kind: WeightKind, hidden: int, width: int) -> PackedLayout:
    scales = torch.float16 if kind.scales == "f16" else torch.bfloat16
    return PackedLayout(kind.bits, kind.group, kind.has_zeros, scales, hidden, width)


def random_matrix(rng: np.random.Generator, kind: WeightKind, rows: int, cols: int) -> Matrix:
    """Codes and zero points of the whole range, scales of both signs, about unit gain."""
    groups = -(-cols // kind.group)
    size_NG = (1 + rng.random((rows, groups))) / (kind.middle * cols**0.5)
    size_NG *= rng.choice([1, -1], (rows, groups))
    scales_NG = decode_scales(encode_scales(size_NG, kind.scales), kind.scales)
    codes_NK = rng.integers(0, kind.max_code + 1, (rows, cols), np.uint8)
    zeros_NG = rng.integers(0, kind.max_code + 1, (rows, groups), np.uint8)
    return Matrix(codes_NK, scales_NG, zeros_NG if kind.has_zeros else None)


def lossless_matrix(rng: np.random.Generator, rows: int, cols: int) -> U16:
    """Bits of bfloat16 weights of about unit gain; a block has no exceptions, the most, or some.

    Exceptions are weights of usual size in rows of tiny ones, and denormal: at both ends of rows,
    too. The others are far from being one. Some weights are zero, of both signs.
    """
    weights_NK = 2.0 ** rng.uniform(-3, 1, (rows, cols)) * rng.choice([-1, 1], (rows, cols))
    weights_NK *= np.where(rng.random((rows, cols)) < 0.1, 0.0, cols**-0.5)
    most = MatrixShape(BF12, rows, cols).most_exceptions
    for block in range(-(-rows // 16)):
        block_NK = weights_NK[16 * block : 16 * block + 16]
        left = (most, int(rng.integers(1, most)), 0)[block % 3]
        for row in rng.permutation(len(block_NK)):
            here = min(left, cols // 3, int(rng.integers(1, most + 1)))
            _plant(rng, block_NK[row], here)
            left -= here
    return f32_to_bf16(weights_NK.astype(np.float32))


def _plant(rng: np.random.Generator, row_K: F32, number: int) -> None:
    """Make so many weights of the row exceptions."""
    if number == 0:
        return
    size = abs(row_K).max()
    columns = rng.permutation(np.arange(1, len(row_K) - 1))[: max(number - 2, 0)]
    columns = np.concatenate([[0, len(row_K) - 1], columns])[:number]
    row_K *= 2.0**-30
    row_K[columns] = rng.uniform(0.5, 1, number) * rng.choice([-size, size], number)
    if number > 2:
        row_K[columns[2]] = -1e-39


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


def _dense(
    rng: np.random.Generator, _: str, slots: int, hidden: int, width: int, dtype: torch.dtype
) -> tuple[DenseWeights, Any, Any]:
    """Slots stand apart, NaN between them."""
    w13_SFH = _normal(rng, slots, 2 * width, hidden) / hidden**0.5
    w2_SHI = _normal(rng, slots, hidden, width) / width**0.5
    apart = []
    for matrices in (w13_SFH.to(dtype), w2_SHI.to(dtype)):
        wide = torch.full((slots, 2, *matrices.shape[1:]), float("nan"), dtype=dtype)
        wide[:, 0] = matrices
        apart.append(wide.to(DEVICE)[:, 0])
    return DenseWeights(*apart), *(w.double().cpu().numpy() for w in apart)


def _lossless(
    rng: np.random.Generator, _: str, slots: int, hidden: int, width: int, __: torch.dtype
) -> tuple[PackedWeights, Any, Any]:
    """Slots stand apart, all bits set between them."""
    layout, shape = packed_layout(BF12, hidden, width), PackedShape(BF12, hidden, width)
    blob_SB = np.full((slots, layout.expert_bytes + 128), 255, np.uint8)
    w13_SFH, w2_SHI = np.zeros((slots, 2 * width, hidden)), np.zeros((slots, hidden, width))
    for slot in range(slots):
        gate, up = (lossless_matrix(rng, width, hidden) for _ in range(2))
        down = lossless_matrix(rng, hidden, width)
        halves = blob_SB[slot, : shape.w2_offset].reshape(-1, 2, shape.gate.block_bytes)
        pack_lossless(gate, halves[:, 0])
        pack_lossless(up, halves[:, 1])
        blocks = blob_SB[slot, shape.w2_offset : shape.expert_bytes]
        pack_lossless(down, blocks.reshape(-1, shape.down.block_bytes))
        w13_SFH[slot], w2_SHI[slot] = bf16_to_f32(np.concatenate([gate, up])), bf16_to_f32(down)
    return PackedWeights(torch.from_numpy(blob_SB).to(DEVICE), layout), w13_SFH, w2_SHI


def _packed(
    rng: np.random.Generator, name: str, slots: int, hidden: int, width: int, _: torch.dtype
) -> tuple[PackedWeights, Any, Any]:
    """Slots stand apart, all bits set between them."""
    kind = parse_kind(name)
    layout = packed_layout(kind, hidden, width)
    blob_SB = np.full((slots, layout.expert_bytes + 128), 255, np.uint8)
    w13_SFH, w2_SHI = np.zeros((slots, 2 * width, hidden)), np.zeros((slots, hidden, width))
    for slot in range(slots):
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        gate, up, down = (random_matrix(rng, kind, *shape) for shape in shapes)
        blob_SB[slot, : layout.expert_bytes] = pack_expert(kind, gate, up, down)
        w13_SFH[slot] = np.concatenate([dequantise(kind, *half) for half in (gate, up)])
        w2_SHI[slot] = dequantise(kind, *down)
    return PackedWeights(torch.from_numpy(blob_SB).to(DEVICE), layout), w13_SFH, w2_SHI

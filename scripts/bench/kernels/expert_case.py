"""Random expert layers and routings of known models' shapes, resident as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from cpu_kernels.lossless import lossless_blocks
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer, PackedLayout, PackedWeights

DEVICE = "cuda"


@dataclass(frozen=True, slots=True)
class Shape:
    """One MoE layer."""

    hidden: int
    width: int
    num_experts: int
    top_k: int


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
}
FORMATS = ("bf16", "bf12", "w4g128")


@dataclass(frozen=True)
class Case:
    """``num_tokens`` random tokens through a layer whose experts all lie in slots."""

    shape: Shape
    layer: ExpertLayer
    num_tokens: int

    @cached_property
    def step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, ids, weights, slot table: distinct experts per token, uniformly drawn."""
        shape, rng = self.shape, torch.Generator(DEVICE).manual_seed(self.num_tokens)
        x_TH = torch.randn(self.num_tokens, shape.hidden, device=DEVICE, generator=rng)
        scores_TE = torch.rand(self.num_tokens, shape.num_experts, device=DEVICE, generator=rng)
        weights_TK, ids_TK = scores_TE.topk(shape.top_k)
        slot_E = torch.randperm(shape.num_experts, device=DEVICE, generator=rng)
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        return x_TH.bfloat16(), ids_TK.int(), weights_TK, slot_E.int()

    def run(self, kernel: Callable[..., Tensor], **options: object) -> Tensor:
        return kernel(*self.step, self.layer, **options)

    @property
    def touched_bytes(self) -> int:
        """Bytes of the distinct experts that the tokens chose."""
        chosen = set(self.step[1].flatten().tolist())
        return len(chosen) * expert_bytes(self.layer)

    @property
    def flops(self) -> int:
        return 6 * self.num_tokens * self.shape.top_k * self.shape.hidden * self.shape.width


def make_layer(shape: Shape, weights: str) -> ExpertLayer:
    """Weights in bf16, the same without loss in bf12, or packed in int4 with groups of 128."""
    slots, hidden, width = shape.num_experts, shape.hidden, shape.width
    if weights == "bf16":
        w13_SFH = torch.empty(slots, 2 * width, hidden, dtype=torch.bfloat16, device=DEVICE)
        w2_SHI = torch.empty(slots, hidden, width, dtype=torch.bfloat16, device=DEVICE)
        return ExpertLayer(
            DenseWeights(w13_SFH.normal_(std=hidden**-0.5), w2_SHI.normal_(std=width**-0.5))
        )
    if weights == "bf12":
        return _lossless_layer(shape)
    assert weights == "w4g128", weights
    layout = PackedLayout(4, 128, False, torch.float16, hidden, width)
    blob_SB = torch.randint(256, (slots, layout.expert_bytes), dtype=torch.uint8, device=DEVICE)
    _fill_scales(blob_SB[:, : layout.w2_offset], layout, hidden)
    _fill_scales(blob_SB[:, layout.w2_offset :], layout, width)
    return ExpertLayer(PackedWeights(blob_SB, layout))


def expert_bytes(layer: ExpertLayer) -> int:
    weights = layer.weights
    if isinstance(weights, DenseWeights):
        return 3 * layer.hidden * layer.width * weights.w2_SHI.itemsize
    return weights.layout.expert_bytes


def _lossless_layer(shape: Shape) -> ExpertLayer:
    """One slot's weights are normal numbers, the others are copies of it."""
    slots, hidden, width = shape.num_experts, shape.hidden, shape.width
    layout = PackedLayout(12, 64, False, torch.bfloat16, hidden, width)
    blob_SB = torch.empty(slots, layout.expert_bytes, dtype=torch.uint8, device=DEVICE)
    halves = [_lossless_blocks(width, hidden) for _ in range(2)]
    blob_SB[:, : layout.w2_offset] = torch.stack(halves, 1).flatten()
    blob_SB[:, layout.w2_offset :] = _lossless_blocks(hidden, width).flatten()
    return ExpertLayer(PackedWeights(blob_SB, layout))


def _lossless_blocks(rows: int, cols: int) -> Tensor:
    """The blocks of a matrix of normal numbers."""
    weights_NK = torch.randn(rows, cols, device=DEVICE).bfloat16() * cols**-0.5
    bits_NK = weights_NK.view(torch.int16).cpu().numpy().view(np.uint16)
    return torch.from_numpy(lossless_blocks(bits_NK)).to(DEVICE)


def _fill_scales(blob_SB: Tensor, layout: PackedLayout, cols: int) -> None:
    """Random finite scales in every block, weights of about unit gain."""
    blocks = blob_SB.view(len(blob_SB), -1, layout.block_bytes(cols))
    begin, end = layout.scale_offset(cols), layout.zero_offset(cols)
    shape = (*blocks.shape[:2], (end - begin) // 2)
    scales = (0.5 + torch.rand(shape, device=DEVICE)) * 0.2 * cols**-0.5
    blocks[:, :, begin:end] = scales.to(layout.scale_dtype).view(torch.uint8)

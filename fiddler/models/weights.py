"""Weights on their way from a source to their place: one tensor at a time, never the model twice.

Legend: V vocab, H hidden, E experts, I expert width, F rows of fused projections.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cpu_kernels.bf16 import U16
from cpu_kernels.packed_layout import U8, MatrixShape, PackedShape
from fiddler.errors import NumericsError
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import (
    Parts,
    expert_parts,
    layer_parts,
    model_parts,
)
from fiddler.models.outliers import places


class WeightSource(Protocol):
    """Where weights come from: a checkpoint or a seed."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor on the CPU, as stored; callers do not write to it."""

    def forget(self, name: str) -> None:
        """Say that a tensor will not be asked for again soon; any thread may."""

    def fill_(self, out: Tensor, name: str) -> None:
        """Write a tensor of ``out``'s shape into ``out``, in its dtype and on its device."""


class CheckpointSource:
    """Weights of an open checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a view of the mapped file."""
        return self._checkpoint.tensor(name, shape)

    def forget(self, name: str) -> None:
        """Leave no mapped page behind."""
        self._checkpoint.forget(name)

    def fill_(self, out: Tensor, name: str) -> None:
        """Read and check: NaN or Inf is a :class:`NumericsError`."""
        if not self._checkpoint.read(name, out):
            raise NumericsError(f"tensor {name} of {self._checkpoint.folder} holds NaN or Inf")

    def fill_packed_(self, out_B: Tensor, name: str, shape: PackedShape) -> None:
        """Read and check: scales that are NaN or Inf are a :class:`NumericsError`."""
        if not has_finite_scales(self._checkpoint.read_packed(name, out_B), shape):
            raise NumericsError(f"tensor {name} of {self._checkpoint.folder} holds NaN or Inf")


def has_finite_scales(packed: U8, shape: PackedShape) -> bool:
    """Whether all weights of a packed expert are numbers; reads the scales alone, 3 % of w4g128."""
    exponent = np.uint16(0x7C00 if shape.kind.scales == "f16" else 0x7F80)
    halves = (packed[: shape.w2_offset], shape.gate), (packed[shape.w2_offset :], shape.down)
    return all(
        ((_scale_bits(part, matrix) & exponent) != exponent).all() for part, matrix in halves
    )


def _scale_bits(blocks: U8, shape: MatrixShape) -> U16:
    scales = blocks.reshape(-1, shape.block_bytes)[:, shape.scale_offset : shape.zero_offset]
    return np.ascontiguousarray(scales).view(np.uint16)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer without its routed experts; None: the model has no such weight."""

    input_norm_H: Tensor
    post_attention_norm_H: Tensor
    qkv_FH: Tensor  # rows of q, then k, then v
    o_HF: Tensor
    qkv_bias_F: Tensor | None = None
    o_bias_H: Tensor | None = None
    q_norm: Tensor | None = None  # [head_dim] or [heads * head_dim], see QKNorm
    k_norm: Tensor | None = None
    router_EH: Tensor | None = None
    shared_gate_up_FH: Tensor | None = None  # rows of gate, then up
    shared_down_HF: Tensor | None = None
    shared_router_1H: Tensor | None = None
    dense_gate_up_FH: Tensor | None = None
    dense_down_HF: Tensor | None = None
    expert_inputs_X: Tensor | None = None  # hidden channels in the order that experts read, int64


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeights:
    """Everything but the routed experts. A tied ``lm_head_VH`` is ``embed_VH`` itself.

    Else ``embed_VH`` may lie in pinned host memory, while all others are on the device.
    """

    embed_VH: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_H: Tensor
    lm_head_VH: Tensor


def load_dense(
    source: WeightSource,
    config: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    embed_VH: Tensor | None = None,
) -> DenseWeights:
    """Load all but the routed experts; costs :func:`manifest.dense_bytes` and one tensor.

    ``embed_VH``: the input embedding, loaded elsewhere, which is not the head; None: it comes to
    ``device`` like the rest.
    """
    parts, whole = model_parts(config), {}
    if embed_VH is not None:
        assert not config.tie_embeddings
        del parts["embed_VH"]
        whole["embed_VH"] = embed_VH
    whole |= _place(source, parts, device, dtype)
    layers = [
        load_layer(source, config, i, device=device, dtype=dtype) for i in range(config.num_layers)
    ]
    whole.setdefault("lm_head_VH", whole["embed_VH"])
    return DenseWeights(layers=tuple(layers), **whole)


def load_embedding_into(source: WeightSource, config: ModelConfig, out_VH: Tensor) -> None:
    """Write the input embedding."""
    (part,) = model_parts(config)["embed_VH"]
    source.fill_(out_VH, part.name)


def load_layer(
    source: WeightSource,
    config: ModelConfig,
    layer: int,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> LayerWeights:
    """Load one layer without its routed experts."""
    placed = _place(source, layer_parts(config, layer), device, dtype)
    return LayerWeights(**placed, expert_inputs_X=_expert_inputs(config, layer, device))


def _expert_inputs(config: ModelConfig, layer: int, device: torch.device | str) -> Tensor | None:
    """None: as they are. What padding reads does not matter."""
    if config.packed is None or not config.outliers or not config.outliers[layer]:
        return None
    order = places(config.hidden_size, config.outliers[layer], config.packed.group)
    return torch.tensor(order, device=device).clamp_(min=0)


def load_expert_into(
    source: WeightSource,
    config: ModelConfig,
    layer: int,
    expert: int,
    w13_FH: Tensor,
    w2_HI: Tensor,
) -> None:
    """Write gate and up into rows [0:I] and [I:2I] of ``w13_FH``, and down into ``w2_HI``."""
    width = config.expert_size
    gate, up, down = expert_parts(config, layer, expert)
    source.fill_(w13_FH[:width], gate.name)
    source.fill_(w13_FH[width:], up.name)
    source.fill_(w2_HI, down.name)


def _place(
    source: WeightSource,
    fields: dict[str, Parts],
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    return {field: _stack(source, parts, device, dtype) for field, parts in fields.items()}


def _stack(
    source: WeightSource, parts: Parts, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    out = torch.empty((rows, *parts[0].shape[1:]), device=device, dtype=dtype)
    start = 0
    for part in parts:
        source.fill_(out[start : start + part.shape[0]], part.name)
        start += part.shape[0]
    return out

"""A part of every expert, for calls that leave the other part to somebody else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_kernels.expert_weights import DenseWeights, ExpertLayer


@dataclass(frozen=True, slots=True)
class LastRows:
    """A part of every expert: rows of gate and up, and columns of w2, from some row to the last.

    ``first_TK`` says for each choice which, int32 on the device, the same for all choices of an
    expert: a multiple of ``unit`` or the width, and never less than the width minus ``most``.
    ``unit``: a power of two, 16 or more, and whole groups if packed.
    """

    first_TK: Tensor
    most: int
    unit: int

    def check(self, layer: ExpertLayer, ids_TK: Tensor) -> None:
        """Assert that it suits the layer, which has no biases: the other part's owner adds them."""
        assert self.first_TK.shape == ids_TK.shape and self.first_TK.dtype == torch.int32
        assert self.first_TK.device == layer.device and self.first_TK.is_contiguous()
        assert 0 < self.most <= layer.width
        assert self.unit >= 16 and self.unit & (self.unit - 1) == 0
        if not isinstance(layer.weights, DenseWeights):
            assert self.unit % layer.weights.layout.group == 0
        assert layer.b13_SF is None and layer.b2_SH is None

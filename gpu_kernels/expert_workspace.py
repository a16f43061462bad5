"""Room between the two launches of :mod:`gpu_kernels.expert_decode`.

Shapes: P pairs of a token and its choice, S parts of w2's depth, H hidden, I width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_kernels.expert_config import ExpertConfig, decode_config
from gpu_kernels.expert_weights import ExpertLayer


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Scratch of one stream: what lies between the launches, and how many programs are done.

    The counters are 0 between calls: each call leaves them so.
    """

    act_PI: Tensor
    part_PSH: Tensor
    done: Tensor

    @classmethod
    def make(
        cls,
        layer: ExpertLayer,
        num_pairs: int,
        dtype: torch.dtype = torch.bfloat16,
        config: ExpertConfig | None = None,
    ) -> DecodeWorkspace:
        """For up to ``num_pairs`` pairs of layers of this one's sizes and kind, x of ``dtype``."""
        device, hidden = layer.device, layer.hidden
        splits = (config or decode_config(layer, 1, dtype)).down.splits
        return cls(
            torch.empty((num_pairs, layer.width), dtype=dtype, device=device),
            torch.empty((num_pairs, splits, hidden), dtype=torch.float32, device=device),
            torch.zeros(-(-hidden // 16), dtype=torch.int32, device=device),
        )

    def check(
        self, layer: ExpertLayer, num_pairs: int, dtype: torch.dtype, config: ExpertConfig
    ) -> None:
        """Assert that a call with so many pairs and x of ``dtype`` fits."""
        act, part, done = self.act_PI, self.part_PSH, self.done
        assert act.shape[0] >= num_pairs and act.shape[1] == layer.width and act.dtype == dtype
        assert part.shape[0] * part.shape[1] >= num_pairs * config.down.splits
        assert part.shape[2] == layer.hidden
        assert part.dtype == torch.float32 and done.dtype == torch.int32
        assert done.shape[0] >= -(-layer.hidden // 16)
        assert all(t.is_contiguous() and t.device == layer.device for t in (act, part, done))

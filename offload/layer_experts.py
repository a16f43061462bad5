"""The memory of one layer's experts, and the tables that say which expert lies where in it.

Shapes: E experts, S slots, C rows on the CPU side, F = 2I, H hidden, I expert width, B bytes of a
packed expert.
"""

from dataclasses import dataclass

import numpy as np
import torch

from cpu_kernels.experts import Experts
from cpu_kernels.packed_layout import PackedShape
from offload.packed_expert import dequantised


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One layer's experts. ``slot_E`` and ``row_E`` are int32 with -1 for "not here".

    ``expert_C`` is the expert of each row. There may be one slot more than residents.
    ``cpu_experts`` are the rows as the CPU kernels take them; None: there is no row. Of ``packed``
    experts the blobs hold the bytes, and ``*_w13`` and ``*_w2`` are views of their two parts.
    """

    slot_E: np.ndarray
    row_E: np.ndarray
    expert_C: np.ndarray
    cpu_experts: Experts | None
    gpu_w13_SFH: torch.Tensor
    gpu_w2_SHI: torch.Tensor
    cpu_w13_CFH: torch.Tensor
    cpu_w2_CHI: torch.Tensor
    packed: PackedShape | None = None
    gpu_blob_SB: torch.Tensor | None = None
    cpu_blob_CB: torch.Tensor | None = None

    @property
    def gpu_parts(self) -> tuple[torch.Tensor, ...]:
        """What holds the slots: ``(w13, w2)``, or ``(blob,)`` if packed."""
        if self.gpu_blob_SB is not None:
            return (self.gpu_blob_SB,)
        return self.gpu_w13_SFH, self.gpu_w2_SHI

    @property
    def cpu_parts(self) -> tuple[torch.Tensor, ...]:
        """The same of the rows."""
        if self.cpu_blob_CB is not None:
            return (self.cpu_blob_CB,)
        return self.cpu_w13_CFH, self.cpu_w2_CHI

    def place(self, expert: int) -> tuple[torch.Tensor, ...]:
        """Views of one expert's parts."""
        slot, row = int(self.slot_E[expert]), int(self.row_E[expert])
        parts, at = (self.gpu_parts, slot) if slot >= 0 else (self.cpu_parts, row)
        return tuple(part[at] for part in parts)

    def gpu_weights(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(w13_FH, w2_HI)`` of a slot as numbers; those of a packed one are computed."""
        return self._numbers(tuple(part[slot] for part in self.gpu_parts))

    def weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of an expert, wherever it lies."""
        return self._numbers(self.place(expert))

    def _numbers(self, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.packed is not None:
            return dequantised(parts[0], self.packed)
        w13_FH, w2_HI = parts
        return w13_FH, w2_HI

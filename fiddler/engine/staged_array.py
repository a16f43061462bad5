"""Several small arrays as one: a single copy brings all of them to the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

Kind = Literal["int32", "int64", "float32"]

ALIGNMENT = 16  # int32 in 64 bytes: kernels compiled for aligned addresses fit every field
WORDS: dict[Kind, int] = {"int32": 1, "int64": 2, "float32": 1}


@dataclass(frozen=True, slots=True)
class Field:
    """``size`` numbers of a kind, from int32 ``first`` of the array on."""

    kind: Kind
    first: int
    size: int

    @property
    def end(self) -> int:
        """One past the last int32."""
        return self.first + self.size * WORDS[self.kind]

    def on_host(self, array: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """The numbers, a view."""
        return array[self.first : self.end].view(self.kind)

    def on_device(self, array: torch.Tensor) -> torch.Tensor:
        """The numbers, a view."""
        dtype: torch.dtype = getattr(torch, self.kind)
        return array[self.first : self.end].view(dtype)


def lay_out(sizes: Mapping[str, tuple[Kind, int]]) -> tuple[dict[str, Field], int]:
    """Every field's place, and the int32 of all."""
    fields, end = {}, 0
    for name, (kind, size) in sizes.items():
        fields[name] = Field(kind, end, size)
        end = -(-fields[name].end // ALIGNMENT) * ALIGNMENT
    return fields, end


class StagedArray:
    """Fields on the host (pinned where there is a GPU), zeros at first, and on the device.

    Ordering: write to ``host`` only while no work is under way that has :meth:`send` in it.
    """

    def __init__(self, sizes: Mapping[str, tuple[Kind, int]], device: torch.device) -> None:
        fields, size = lay_out(sizes)
        self._host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        host = self._host.numpy()
        self.host = {name: field.on_host(host) for name, field in fields.items()}
        self.device = {name: field.on_device(self._device) for name, field in fields.items()}

    def send(self) -> None:
        """Put the copy to the device on the current stream."""
        self._device.copy_(self._host, non_blocking=True)

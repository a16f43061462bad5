"""Several small arrays as one: a single copy brings all of them to the device, or from it."""

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
    """Fields on the device, and on the host (pinned where there is a GPU), zeros at first.

    The host may have several sides, to write or read one while a copy of another is under way.

    Ordering: use a side only while no copy of it is under way.
    """

    def __init__(
        self, sizes: Mapping[str, tuple[Kind, int]], device: torch.device, num_sides: int = 1
    ) -> None:
        self._fields, size = lay_out(sizes)
        is_gpu = device.type == "cuda"
        self._host = torch.zeros((num_sides, size), dtype=torch.int32, pin_memory=is_gpu)
        self._device = torch.zeros(size, dtype=torch.int32, device=device)
        self.sides = tuple(
            {name: field.on_host(side) for name, field in self._fields.items()}
            for side in self._host.numpy()
        )
        self.device = {name: field.on_device(self._device) for name, field in self._fields.items()}

    def send(self, side: int = 0, *, before: str | None = None) -> None:
        """Put the copy to the device on the current stream; ``before``: of the fields before it."""
        end = None if before is None else self._fields[before].first
        self._device[:end].copy_(self._host[side, :end], non_blocking=True)

    def fetch(self, side: int = 0) -> None:
        """Put the copy from the device on the current stream."""
        self._host[side].copy_(self._device, non_blocking=True)

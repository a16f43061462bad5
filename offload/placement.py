"""Which expert lives where: (layer, expert) ids and nothing else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts on the GPU side, layer by layer; all others are on the CPU side.

    A layer without experts has an empty set.
    """

    resident: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, layers: Iterable[Iterable[int]]) -> Self:
        """Build from any iterable of iterables of expert ids."""
        return cls(tuple(frozenset(layer) for layer in layers))

    @property
    def num_resident(self) -> int:
        """Experts on the GPU side over all layers."""
        return sum(len(layer) for layer in self.resident)

"""The tables of :class:`offload.swaps.Swaps` without a store: who is resident while experts move.

Shapes: M layers, E experts.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from offload.adaptive import Swap


class SimulatedSwaps:
    """Takes the same calls, and has the same experts resident after each."""

    def __init__(self, is_resident_ME: npt.NDArray[np.bool_]) -> None:
        """Every layer with experts on both sides has a spare slot."""
        self.is_resident_ME = is_resident_ME.copy()
        num_M = is_resident_ME.sum(axis=1)
        has_both_M = (num_M > 0) & (num_M < is_resident_ME.shape[1])
        self._idle = set(np.flatnonzero(has_both_M).tolist())
        self._coming: list[Swap] = []
        self._leaving: list[Swap] = []

    @property
    def idle_layers(self) -> list[int]:
        """Layers in which a swap may start."""
        return sorted(self._idle)

    def start(self, swaps: Iterable[Swap]) -> None:
        """Begin to copy what comes, at most one in each of the idle layers."""
        for swap in swaps:
            self._idle.remove(swap.layer)
            self._coming.append(swap)

    def advance(self) -> int:
        """What was under way is there: what came is resident, what left is not any more.

        Returns how many experts are being copied to the host from now on.
        """
        for swap in self._leaving:
            self.is_resident_ME[swap.layer, swap.leaves] = False
            self._idle.add(swap.layer)
        self._leaving, self._coming = self._coming, []
        for swap in self._leaving:
            self.is_resident_ME[swap.layer, swap.comes] = True
        return len(self._leaving)

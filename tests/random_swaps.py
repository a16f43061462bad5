"""An adaptive placement that moves experts at random, as often as it can.

L layers, E experts.
"""

import functools
from typing import Any

import numpy as np

from offload.adaptive import Swap
from offload.adaptive_placement import AdaptivePlacement


class RandomSwaps:
    """Chooses a swap in two of three idle layers, whatever is used; the same ones every time."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(
        self, heat_LE: Any, is_resident_LE: np.ndarray, layers: list[int], most: int
    ) -> list[Swap]:
        swaps = []
        for layer in layers:
            sides = [np.flatnonzero(is_resident_LE[layer] == side) for side in (False, True)]
            comes, leaves = (int(self._rng.choice(side)) for side in sides)
            if self._rng.random() < 0.67:
                swaps.append(Swap(layer, comes, leaves))
        return swaps[:most]


def random_placement(seed: int = 0) -> functools.partial[AdaptivePlacement]:
    """To be called with a store and a device."""
    return functools.partial(AdaptivePlacement, choose=RandomSwaps(seed), copy_share=1e9)

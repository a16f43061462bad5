"""Which experts some steps used, and how many of them had to be read on either side.

Shapes: L layers, E experts, T tokens, K top-k.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.placement import Placement
from offload.popularity import hit_rate


class Tally:
    """``cold_reads`` and ``hot_reads`` count experts once for each step and layer that uses them.

    However many tokens of a step share an expert, its weights have to be read once.
    """

    def __init__(self, placement: Placement, num_experts: int) -> None:
        self._placement = placement
        self._resident_LE = np.zeros((len(placement.resident), num_experts), dtype=bool)
        for layer, experts in enumerate(placement.resident):
            self._resident_LE[layer, sorted(experts)] = True
        self.counts_LE: npt.NDArray[np.int64] = np.zeros(self._resident_LE.shape, dtype=np.int64)
        self.cold_reads = 0
        self.hot_reads = 0
        self.num_steps = 0

    def add(self, ids: Mapping[int, npt.NDArray[Any]]) -> None:
        """Count one step, whose layers chose ``ids[layer]`` ``[T, K]``."""
        self.num_steps += 1
        for layer, ids_TK in ids.items():
            counts_E = np.bincount(ids_TK.ravel(), minlength=self.counts_LE.shape[1])
            self.counts_LE[layer] += counts_E
            num_hot = int((self._resident_LE[layer] & (counts_E > 0)).sum())
            self.hot_reads += num_hot
            self.cold_reads += int((counts_E > 0).sum()) - num_hot

    @property
    def hit_rate(self) -> float:
        """Share of (token, expert) pairs that met a resident expert; 0.0 if there were none."""
        return hit_rate(self._placement, self.counts_LE)

    @property
    def entropy_bits(self) -> float:
        """Entropy of the experts used, mean over the layers that have experts."""
        used_LE = self.counts_LE[self.counts_LE.any(axis=1)]
        share_LE = used_LE / used_LE.sum(axis=1, keepdims=True)
        bits_LE = -share_LE * np.log2(np.where(share_LE > 0, share_LE, 1.0))
        return float(bits_LE.sum(axis=1).mean()) if len(used_LE) else 0.0

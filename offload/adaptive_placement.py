"""Lets a store's experts follow what a model's requests use: counts, decides, has them moved.

Shapes: L layers, E experts, T tokens, K choices, M layers with experts.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from offload.adaptive import COPY_SHARE, LINK_SHARE, CopyBudget, Heat, Swap, choose_swaps
from offload.expert_store import ExpertStore
from offload.swaps import Swaps

# (heat_LE, is_resident_LE, layers, most) to swaps; see choose_swaps
Chooser = Callable[[npt.NDArray[np.float64], npt.NDArray[np.bool_], list[int], int], list[Swap]]


class AdaptivePlacement:
    """Of one store; lives as long as it does. All calls come between steps, from one thread."""

    def __init__(
        self,
        store: ExpertStore,
        device: torch.device,
        *,
        choose: Chooser = choose_swaps,
        copy_share: float = COPY_SHARE,
    ) -> None:
        """``store`` has spare slots. ``copy_share``: the part of a step's time for copies."""
        shape = store.shape
        self._store, self._choose = store, choose
        self._swaps = Swaps(store, device)
        self._heat = Heat(shape.num_layers, shape.num_experts)
        # the largest stand for all: what is earned and what swaps cost are counted in experts
        largest = store.expert_bytes(store.largest_layer)
        self._budget = CopyBudget(largest, copy_share * LINK_SHARE)
        self.num_swaps = 0

    @property
    def version(self) -> int:
        """Grows whenever the store's tables have changed."""
        return self._swaps.version

    def count(self, layers: Sequence[int], ids_MTK: np.ndarray) -> None:
        """A step that decoded has chosen ``ids_MTK``, row n in ``layers[n]``."""
        ids_MC = ids_MTK.reshape(len(layers), -1)
        self._heat.count(layers, ids_MC)
        is_used_LE = np.zeros(self._heat.heat_LE.shape, dtype=bool)
        is_used_LE[np.asarray(layers)[:, None], ids_MC] = True
        self._budget.earn(int((is_used_LE & ~self._store.is_resident_LE()).sum()))

    def move(self) -> None:
        """Put into the tables what has been copied, and begin the next swaps."""
        self._swaps.advance()
        most = self._budget.num_swaps
        if most:
            layers = self._swaps.idle_layers
            swaps = self._choose(self._heat.heat_LE, self._store.is_resident_LE(), layers, most)
            self._budget.spend(len(swaps))
            self.num_swaps += len(swaps)
            self._swaps.start(swaps)

    def settle(self) -> None:
        """End what has begun, before a step that wants each expert in one place."""
        self._swaps.settle()

"""Lets a store's experts follow what a model's requests use: counts, decides, has them moved.

Shapes: L layers, E experts, T tokens, K choices, M layers with experts.
"""

from collections.abc import Sequence

import numpy as np
import torch

from offload.adaptive import COPY_SHARE, AdaptivePolicy, Chooser, Swap, choose_swaps
from offload.expert_store import ExpertStore
from offload.swaps import Swaps


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
        self._store = store
        self._swaps = Swaps(store, device)
        self._policy = AdaptivePolicy(
            shape.num_layers,
            shape.num_experts,
            # the largest stand for all: what is earned and what swaps cost are counted in experts
            store.expert_bytes(store.largest_layer),
            choose=choose,
            copy_share=copy_share,
        )
        self._chosen: list[Swap] = []  # and not begun
        self.num_swaps = 0

    @property
    def version(self) -> int:
        """Grows whenever the store's tables have changed."""
        return self._swaps.version

    def count(self, layers: Sequence[int], ids_MTK: np.ndarray) -> None:
        """A step that decoded has chosen ``ids_MTK``, row n in ``layers[n]``."""
        ids_MC = ids_MTK.reshape(len(layers), -1)
        self._policy.count(layers, ids_MC, self._store.is_resident_LE())

    @property
    def must_move(self) -> bool:
        """Whether :meth:`move` has anything to do, so that it has to come before another step."""
        if self._swaps.is_idle and not self._chosen:
            self._chosen = self._choose()
        return not self._swaps.is_idle or bool(self._chosen)

    def move(self) -> None:
        """Put into the tables what has been copied, and begin the next swaps."""
        self._swaps.advance()
        swaps, self._chosen = self._chosen or self._choose(), []
        if swaps:
            self.num_swaps += len(swaps)
            self._swaps.start(swaps)

    def _choose(self) -> list[Swap]:
        return self._policy.swaps(self._store.is_resident_LE, self._swaps.idle_layers)

    def settle(self) -> None:
        """End what has begun, before a step that wants each expert in one place."""
        self._swaps.settle()

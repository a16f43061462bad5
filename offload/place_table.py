"""Where every expert lies, as kernels read it: a table of a store on the device.

Ordering: ``send`` comes between steps, on the stream of the next one; the host's side is written to
again only after that step has ended.

Shapes: L layers, E experts.
"""

from typing import Literal

import numpy as np
import torch

from offload.expert_store import ExpertStore


class PlaceTable:
    """``device_LE``, int32 and always the same tensor, is what ``host_LE`` was at the last send.

    ``which``: an expert's slot on the device, or its row on the host; -1: it has none.
    """

    def __init__(
        self, store: ExpertStore, which: Literal["slot_E", "row_E"], device: torch.device
    ) -> None:
        shape = store.shape.num_layers, store.shape.num_experts
        self._store, self._which = store, which
        self._staging_LE = torch.full(
            shape, -1, dtype=torch.int32, pin_memory=device.type == "cuda"
        )
        self.host_LE: np.ndarray = self._staging_LE.numpy()
        self.device_LE = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.send()

    def send(self) -> None:
        """Read the store's tables and put the copy to the device on the current stream."""
        for layer in self._store.shape.moe_layers:
            self.host_LE[layer] = getattr(self._store[layer], self._which)
        self.device_LE.copy_(self._staging_LE, non_blocking=True)

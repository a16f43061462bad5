"""What the routers of a step chose, and how often each expert was chosen in all.

Ordering: one thread adds; another may read ``counts_LE``, as they were after some step.

Shapes: L layers, T tokens of a step, K top-k, E experts, N layers that have told nothing yet.
"""

from dataclasses import dataclass

import numpy as np
import torch

from offload.expert_store import ExpertStore


@dataclass(slots=True)
class StepRouting:
    """What the router chose in one step. ``ids`` has one ``[T, K]`` int16 array per MoE layer.

    ``is_resident_LE`` says which experts had a slot then.
    """

    hot_T: np.ndarray  # (layer, expert) pairs of each token that met a resident expert
    cold_T: np.ndarray  # those that did not, whoever computed them
    ids: dict[int, np.ndarray]
    is_resident_LE: np.ndarray


class RoutingRecord:
    """Of one store."""

    def __init__(self, store: ExpertStore) -> None:
        self._store = store
        shape = store.shape.num_layers, store.shape.num_experts
        self.counts_LE = np.zeros(shape, dtype=np.int64)
        self._unread: list[tuple[int, torch.Tensor]] = []  # layers, and what was chosen there
        self.begin(0)

    def begin(self, num_tokens: int) -> None:
        """Start a new step."""
        self._read()
        self._step = StepRouting(
            np.zeros(num_tokens, dtype=np.int64),
            np.zeros(num_tokens, dtype=np.int64),
            {},
            np.zeros(self.counts_LE.shape, dtype=bool),
        )

    @property
    def step(self) -> StepRouting:
        """The last one, complete: what is still on the device is waited for."""
        self._read()
        return self._step

    def replace(self, step: StepRouting) -> None:
        """Another has recorded ``step``; what an abandoned one has left is forgotten."""
        self._unread.clear()
        self._step = step

    def add(self, layer: int, ids_TK: np.ndarray, counts_E: np.ndarray | None = None) -> None:
        """What a layer chose; ``counts_E``: how often each expert, where that is known."""
        if counts_E is None:
            counts_E = np.bincount(ids_TK.ravel(), minlength=self.counts_LE.shape[1])
        step, is_resident_E = self._step, self._store[layer].slot_E >= 0
        # a product, as a sum of booleans by rows takes three times as long
        hot_TK = is_resident_E.astype(np.float32).take(ids_TK)
        num_hot_T = (hot_TK @ np.ones(ids_TK.shape[1], np.float32)).astype(np.int64)
        step.hot_T += num_hot_T
        step.cold_T += ids_TK.shape[1] - num_hot_T
        step.ids[layer] = ids_TK.astype(np.int16)
        step.is_resident_LE[layer] = is_resident_E
        self.counts_LE[layer] += counts_E

    def add_later(self, layer: int, ids_TK: torch.Tensor) -> None:
        """What a layer without cold experts chose, on the device; it stays there until asked for.

        int32, and nobody writes to it again.
        """
        self._unread.append((layer, ids_TK))

    def routed_ids(self, rows: slice, top_k: int) -> np.ndarray:
        """The step's choices for some tokens, int16 ``[tokens, layers, K]``; -1: no experts."""
        chosen_TLK = np.full((rows.stop - rows.start, len(self.counts_LE), top_k), -1, np.int16)
        for layer, ids_TK in self.step.ids.items():
            chosen_TLK[:, layer] = ids_TK[rows]
        return chosen_TLK

    def _read(self) -> None:
        """All layers that have told nothing, at once."""
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        layers = [layer for layer, _ in unread]
        ids_NTK = torch.stack([ids_TK for _, ids_TK in unread])
        num_experts = self.counts_LE.shape[1]
        first_N = num_experts * torch.arange(len(layers), device=ids_NTK.device)
        experts = (ids_NTK + first_N[:, None, None]).flatten()
        counts = experts.bincount(minlength=len(layers) * num_experts)
        self.counts_LE[layers] += counts.view(-1, num_experts).cpu().numpy()
        self._step.ids.update(zip(layers, ids_NTK.to(torch.int16).cpu().numpy(), strict=True))
        self._step.hot_T += len(layers) * ids_NTK.shape[2]
        self._step.is_resident_LE[layers] = True

"""Moves experts between the device and the host while a model decodes, a pair at a time.

Two experts of a layer change places in two moves, a step each: the one that comes is copied from
its row on the host to a spare slot; once it is there the one that leaves is copied from its slot to
that row, and its slot is the next spare one. At any time every expert lies complete where the
store's tables say.

Ordering: all calls but ``is_idle`` come between steps, when the streams that compute have come to
their end. Copies have a stream of their own and run beside the next step, which neither reads the
slot nor the row that they write to: no table names them. Only after the host has waited for a copy
do the tables change. The host waits at the first call after the step, when the copy is long done,
rather than ask whether it is done: so equal requests meet equal tables.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from offload.adaptive import Swap
from offload.expert_store import ExpertStore
from offload.side_stream import SideStream


@dataclass(frozen=True, slots=True)
class _Move:
    """A swap under way: the slot that the newcomer takes, and the row that it leaves."""

    swap: Swap
    slot: int
    row: int


class Swaps:
    """The only writer of a store's tables while a model runs.

    ``version`` grows whenever the tables have changed.
    """

    def __init__(self, store: ExpertStore, device: torch.device) -> None:
        """``store`` has spare slots."""
        self._store = store
        self._spare = {
            layer: slot
            for layer in store.shape.moe_layers
            if (slot := _spare_slot(store, layer)) is not None
        }
        self._coming: list[_Move] = []
        self._leaving: list[_Move] = []
        self._copies = SideStream(device)
        self.version = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing moves."""
        return not (self._coming or self._leaving)

    @property
    def idle_layers(self) -> list[int]:
        """Layers in which a swap may start."""
        return sorted(self._spare)

    def start(self, swaps: Iterable[Swap]) -> None:
        """Begin to copy what comes, at most one in each of the idle layers."""
        with self._copies.beside():  # after all the step's work
            for swap in swaps:
                at = self._store[swap.layer]
                slot, row = self._spare.pop(swap.layer), int(at.row_E[swap.comes])
                assert row >= 0 and at.slot_E[swap.leaves] >= 0, swap
                for here, there in zip(at.gpu_parts, at.cpu_parts, strict=True):
                    here[slot].copy_(there[row], non_blocking=True)
                self._coming.append(_Move(swap, slot, row))

    def advance(self) -> None:
        """Wait for the copies under way, put what they have moved into the tables, and go on."""
        if self.is_idle:
            return
        self._copies.synchronize()
        for move in self._leaving:
            self._put_on_host(move)
        arrived, self._coming, self._leaving = self._coming, [], []
        for move in arrived:
            at = self._store[move.swap.layer]
            at.slot_E[move.swap.comes], at.row_E[move.swap.comes] = move.slot, -1
        with self._copies.beside():  # after all the step's work
            for move in arrived:
                at = self._store[move.swap.layer]
                slot = int(at.slot_E[move.swap.leaves])
                for here, there in zip(at.gpu_parts, at.cpu_parts, strict=True):
                    there[move.row].copy_(here[slot], non_blocking=True)
                self._leaving.append(move)
        self.version += 1

    def settle(self) -> None:
        """End all swaps that have begun: every slot but the spare ones and every row is in use."""
        while not self.is_idle:
            self.advance()

    def _put_on_host(self, move: _Move) -> None:
        at, leaves = self._store[move.swap.layer], move.swap.leaves
        self._spare[move.swap.layer] = int(at.slot_E[leaves])
        at.slot_E[leaves], at.row_E[leaves] = -1, move.row
        at.expert_C[move.row] = leaves


def _spare_slot(store: ExpertStore, layer: int) -> int | None:
    """The slot that no expert has."""
    at = store[layer]
    free = set(range(len(at.gpu_w2_SHI))) - set(at.slot_E.tolist())
    assert len(free) <= 1
    return free.pop() if free else None

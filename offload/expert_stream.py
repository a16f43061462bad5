"""Cold experts on their way through the GPU: a ring of slots in its memory, filled over PCIe.

The ring is divided into banks of some slots, which are filled, used and released together. A bank
takes experts of one layer at a time, and has room for those of the layer with the largest.

Ordering: two streams meet here, the one that computes and the one that copies. The first is torch's
current one when ``reset`` is called, before each step: asking for it at each call took Python most
of its time here. A bank goes through three hands, each after an event of the hand before it:
``send`` lets the copy stream wait until the computation has released the bank, then fills it and
records ``arrived``; ``arrive`` lets the computation wait for that; ``release`` records ``released``
on the computing stream. The host waits for nothing: it only calls them in this order, so that an
event is recorded before somebody is made to wait for it. Copies are made in the order of the calls,
so a bank is asked for when its copies should start, not when they are needed. The sources are not
written to while the model is loaded.

Shapes: S slots of the ring.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cpu_kernels.packed_layout import PackedShape
from gpu_kernels.expert_weights import ExpertLayer
from offload.expert_store import ExpertStore
from offload.slot_weights import empty_parts, slot_weights, slots_of
from offload.staging import bank_slots


class ExpertStream:
    """Brings rows of ``store``'s host memory to ``num_slots`` slots on ``device``.

    On a device without streams (tests) a copy is made when it is asked for.
    """

    def __init__(self, store: ExpertStore, num_slots: int, device: torch.device) -> None:
        size = bank_slots(num_slots, store.expert_bytes(store.largest_layer))
        num_banks = num_slots // size
        slots = num_banks * size
        parts = empty_parts(store, slots, device)
        self._store = store
        self._device, self._is_cuda = device, device.type == "cuda"
        self.bank_size = size
        self.num_slots = slots
        shapes = {store[layer].packed for layer in store.shape.moe_layers}
        self._banks = [
            {shape: _Slots.of([part[a : a + size] for part in parts], shape) for shape in shapes}
            for a in range(0, slots, size)
        ]
        self._holds: list[_Slots | None] = [None] * num_banks  # what the banks are filled with
        self._free = deque(range(num_banks))
        if self._is_cuda:
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._arrived = [_event() for _ in range(num_banks)]
            self._released = [_event() for _ in range(num_banks)]
            self.reset()

    @property
    def has_room(self) -> bool:
        """Whether :meth:`send` finds a bank."""
        return bool(self._free)

    @property
    def is_current(self) -> bool:
        """Whether the computing stream is still torch's current one."""
        return not self._is_cuda or torch.cuda.current_stream(self._device) == self._computes

    def send(self, layer: int, rows: Sequence[int]) -> int:
        """Start to fill the next bank with rows (at most ``bank_size``, ascending); its number."""
        assert 0 < len(rows) <= self.bank_size
        bank, at = self._free.popleft(), self._store[layer]
        slots = self._holds[bank] = self._banks[bank][at.packed]
        if not self._is_cuda:
            _copy(rows, at.cpu_parts, slots.parts)
            return bank
        self._copies.wait_event(self._released[bank])
        try:  # torch.cuda.stream() would ask which stream to come back to
            torch.cuda.set_stream(self._copies)
            _copy(rows, at.cpu_parts, slots.parts)
        finally:
            torch.cuda.set_stream(self._computes)
        self._arrived[bank].record(self._copies)
        return bank

    def arrive(self, bank: int) -> ExpertLayer:
        """The bank's slots; what the computing stream does from now on finds them filled."""
        if self._is_cuda:
            self._computes.wait_event(self._arrived[bank])
        slots = self._holds[bank]
        assert slots is not None
        return slots.weights

    def release(self, bank: int) -> None:
        """The computing stream has been given all that reads the bank: it may be filled again."""
        if self._is_cuda:
            self._released[bank].record(self._computes)
        self._free.append(bank)

    def reset(self) -> None:
        """Take all banks back, whatever was sent: before a step, and after an abandoned one."""
        if self._is_cuda:
            self._computes = torch.cuda.current_stream(self._device)
            self._computes.wait_stream(self._copies)
            for released in self._released:
                released.record(self._computes)
        self._free = deque(range(len(self._banks)))

    @contextmanager
    def kept_busy(self, layer: int) -> Iterator[None]:
        """Within, a thread has the layer's experts copied without end; nobody else may use this.

        It looks every millisecond for banks that have arrived: waiting for an event would keep one
        more core busy than a prompt does.
        """
        rows = list(range(min(self.bank_size, len(self._store[layer].cpu_w13_CFH))))
        is_over = threading.Event()

        def copy_on() -> None:
            sent: deque[int] = deque()
            while not is_over.wait(1e-3):
                while sent and self._has_arrived(sent[0]):
                    self.release(sent.popleft())
                while self.has_room:
                    sent.append(self.send(layer, rows))

        self.reset()
        with ThreadPoolExecutor(1, thread_name_prefix="fiddler-link") as threads:
            copies = threads.submit(copy_on)
            try:
                yield
            finally:
                is_over.set()
                copies.result()
                self.reset()

    def _has_arrived(self, bank: int) -> bool:
        return not self._is_cuda or bool(self._arrived[bank].query())  # type: ignore[no-untyped-call]

    def seconds_per_expert(self, layer: int) -> float:
        """Measured: how long the link takes for one of the layer's experts, over some 500 MB.

        On a GPU only.
        """
        num_rows = len(self._store[layer].cpu_w13_CFH)
        rows = list(range(min(self.bank_size, num_rows)))
        num_sent = len(self._banks) * len(rows)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(2):  # the first time is a warm-up
            self.reset()
            begin.record(self._copies)
            for _ in self._banks:
                self.send(layer, rows)
            end.record(self._copies)
            end.synchronize()
        self.reset()
        return float(begin.elapsed_time(end)) / 1e3 / num_sent


@dataclass(frozen=True, slots=True)
class _Slots:
    """A bank as experts of one shape: where copies go, and what kernels are given."""

    parts: tuple[torch.Tensor, ...]
    weights: ExpertLayer

    @classmethod
    def of(cls, bank: Sequence[torch.Tensor], shape: PackedShape | None) -> "_Slots":
        parts = slots_of(bank, shape)
        return cls(parts, ExpertLayer(slot_weights(parts, shape)))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _copy(rows: Sequence[int], there: Sequence[torch.Tensor], here: Sequence[torch.Tensor]) -> None:
    """``rows`` of the parts ``there`` to the first slots of those ``here``."""
    for at, first, last in _runs(rows):  # rows side by side go in one copy
        for part, rows_there in zip(here, there, strict=True):
            part[at : at + last - first].copy_(rows_there[first:last], non_blocking=True)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(place of the first, first, last + 1) of each run of neighbours in ``rows``."""
    at = 0
    for n in range(1, len(rows) + 1):
        if n == len(rows) or rows[n] != rows[n - 1] + 1:
            yield at, rows[at], rows[n - 1] + 1
            at = n

"""The ring between two streams: who waits for whom, seen on streams that only write it down."""

from typing import Any

import pytest
import torch

from offload import expert_stream
from offload.expert_store import ExpertShape, ExpertStore
from offload.expert_stream import ExpertStream
from offload.placement import Placement
from offload.slot_weights import empty_parts

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Stream:
    """Says in ``log`` what it is given; events are told apart by who recorded them last."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.name} waits for {event.by}")

    def wait_stream(self, stream: "Stream") -> None:
        self.log.append(f"{self.name} waits for all of {stream.name}")


class Event:
    by = "nobody"

    def record(self, stream: Stream) -> None:
        self.by = stream.name
        stream.log.append(f"{stream.name} records")


class Machine:
    """torch.cuda's streams, as far as the ring asks for them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current = Stream("first", self.log)
        patch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", self.log))
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "set_stream", self._set)
        patch.setattr(expert_stream, "empty_parts", lambda *args: empty_parts(*args[:2], CPU))
        patch.setattr(expert_stream, "_copy", self.copy)

    def _set(self, stream: Stream) -> None:
        self.current = stream

    def copy(self, *args: Any) -> None:
        self.log.append(f"copy on {self.current.name}")

    def logged(self) -> list[str]:
        log = list(self.log)
        self.log.clear()
        return log


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def ring(machine: Machine) -> ExpertStream:
    shape = ExpertShape(num_layers=1, moe_layers=(0,), num_experts=4, hidden_size=8, expert_size=4)
    store = ExpertStore(shape, Placement.of([()]), device=CPU, dtype=torch.float32)
    ring = ExpertStream(store, 1, GPU)
    assert machine.logged() == ["first waits for all of copies", "first records"]
    return ring


def test_a_bank_is_handed_on_by_events(ring: ExpertStream, machine: Machine) -> None:
    bank = ring.send(0, [2])
    assert machine.logged() == ["copies waits for first", "copy on copies", "copies records"]
    assert machine.current.name == "first" and not ring.has_room
    ring.arrive(bank)
    ring.release(bank)
    assert machine.logged() == ["first waits for copies", "first records"]
    assert ring.has_room


def test_a_step_may_compute_on_another_stream_than_the_last(
    ring: ExpertStream, machine: Machine
) -> None:
    ring.send(0, [2])
    machine.logged()
    machine.current = Stream("second", machine.log)
    assert not ring.is_current
    ring.reset()
    assert ring.is_current and ring.has_room
    assert machine.logged() == ["second waits for all of copies", "second records"]
    ring.release(ring.send(0, [1]))
    assert machine.logged()[-1] == "second records" and machine.current.name == "second"


def test_a_copy_that_fails_leaves_torch_on_the_computing_stream(
    ring: ExpertStream, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(expert_stream, "_copy", fail)
    with pytest.raises(KeyboardInterrupt):
        ring.send(0, [2])
    assert machine.current.name == "first"

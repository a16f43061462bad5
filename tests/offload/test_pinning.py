"""What is registered with the driver and for how long, with a driver that we make up."""

import gc
from typing import Any

import pytest
import torch

from offload import pinning
from offload.cuda_driver import CudaDriver, DriverError
from offload.pinning import PAGE, PinnedMemory

CONTEXT = 0xC0
OUT_OF_MEMORY = 2


class Library:
    """The driver's calls around registration; it has pages for ``num_pages``."""

    def __init__(self, num_pages: int = 100) -> None:
        self.num_pages = num_pages
        self.contexts: list[int] = []  # pushed
        self.registered: dict[int, int] = {}

    def cuCtxGetCurrent(self, found: Any) -> int:
        found._obj.value = CONTEXT
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.contexts.append(context.value)
        return 0

    def cuCtxPopCurrent_v2(self, popped: Any) -> int:
        popped._obj.value = self.contexts.pop()
        return 0

    def cuMemHostRegister_v2(self, address: Any, num_bytes: Any, flags: Any) -> int:
        assert self.contexts == [CONTEXT] and flags.value == 3
        if sum(self.registered.values()) + num_bytes.value > self.num_pages * PAGE:
            return OUT_OF_MEMORY
        self.registered[address.value] = num_bytes.value
        return 0

    def cuMemHostUnregister(self, address: Any) -> int:
        assert self.contexts == [CONTEXT]
        del self.registered[address.value]
        return 0

    def cuGetErrorString(self, code: Any, text: Any) -> int:
        text._obj.value = {OUT_OF_MEMORY: b"out of memory"}[code.value]
        return 0


class Owner:
    """Holds memory, as a store does."""


def pinned(
    owner: Owner, monkeypatch: pytest.MonkeyPatch, num_pages: int = 100
) -> tuple[PinnedMemory, Library]:
    library: Any = Library(num_pages)
    monkeypatch.setattr(pinning, "cuda_driver", lambda: CudaDriver(library))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return PinnedMemory(owner), library


def test_whole_pages_are_registered_until_released(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    memory, library = pinned(owner, monkeypatch)
    memory.pin(3 * PAGE, 1)
    memory.pin(8 * PAGE, 2 * PAGE + 1)
    assert library.registered == {3 * PAGE: PAGE, 8 * PAGE: 3 * PAGE}
    memory.release()
    memory.release()
    assert library.registered == {} and library.contexts == []


def test_what_is_still_registered_goes_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    memory, library = pinned(owner, monkeypatch)
    memory.pin(PAGE, PAGE)
    del owner
    gc.collect()
    assert library.registered == {} and library.contexts == []


def test_a_refusal_tells_why_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    memory, library = pinned(owner, monkeypatch, num_pages=2)
    memory.pin(PAGE, PAGE)
    with pytest.raises(DriverError, match=r"cuMemHostRegister_v2 .*out of memory \(CUDA error 2\)"):
        memory.pin(4 * PAGE, 2 * PAGE)
    assert library.registered == {PAGE: PAGE} and library.contexts == []
    memory.release()
    assert library.registered == {}


def test_a_call_that_the_driver_lacks_is_a_driver_error() -> None:
    library: Any = Library()
    with pytest.raises(DriverError, match=r"cuStreamWriteValue32_v2 failed: .* not have it"):
        CudaDriver(library).write_word(0, 0, 1)

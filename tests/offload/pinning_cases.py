"""A driver that we make up, which registers memory."""

from typing import Any

import pytest
import torch

from offload import pinning
from offload.cuda_driver import CudaDriver
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

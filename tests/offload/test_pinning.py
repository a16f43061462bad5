"""What is registered with the driver and for how long, with a driver that we make up."""

import gc
from typing import Any

import pytest

from offload.cuda_driver import CudaDriver, DriverError
from offload.pinning import PAGE
from tests.offload.pinning_cases import Library, Owner, pinned


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

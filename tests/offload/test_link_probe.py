"""What NVML says of a link, from a library that we make up."""

import ctypes
from typing import Any

import pytest

from offload.nvml import Device


class Library:
    """NVML's four calls; ``status`` is what each returns."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetCurrPcieLinkGeneration": 4,
            "nvmlDeviceGetCurrPcieLinkWidth": 8,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
        }
        if name not in answers:
            raise AttributeError(name)

        def call(handle: ctypes.c_void_p, value: Any) -> int:
            value._obj.value = answers[name]
            return self.status

        return call


def test_both_links_are_read() -> None:
    device = Device(Library(), ctypes.c_void_p())
    assert device.pcie("Curr") == (4, 8)
    assert device.pcie("Max") == (5, 16)


@pytest.mark.parametrize("library", [Library(status=3), object()])
def test_what_the_driver_hides_is_unknown(library: Any) -> None:
    assert Device(library, ctypes.c_void_p()).pcie("Curr") is None

"""The few calls of the CUDA driver that torch does not offer, through ``libcuda.so.1``.

Stores to and waits for a 32-bit word of mapped host memory, and host functions, each in the order
of a stream; all three may be captured into a CUDA graph. The runtime's Python bindings would do
but for two things: they may be absent, and their host function frees its argument after the first
call, so that a second replay of a graph crashes.

Ordering: a store to a word is a release for all that the stream did before it (the driver's default
flag), and what follows a wait on the stream sees what the host wrote before the awaited value.
"""

import ctypes
import functools
from collections.abc import Callable

import torch

WAIT_UNTIL_EQUAL = 0x1  # CU_STREAM_WAIT_VALUE_EQ
WRITE_AFTER_ALL_BEFORE = 0x0  # CU_STREAM_WRITE_VALUE_DEFAULT: with a memory barrier

HostFunction = Callable[[int], None]
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DriverError(RuntimeError):
    """A call of the driver returned ``code`` (a CUresult)."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call} failed with CUDA error {code}")
        self.code = code


class HostCallback:
    """A Python function as the driver calls it, with an integer. Keep it while a graph holds it.

    It runs on a thread of the driver and takes Python's lock; it may call nothing of CUDA. What it
    raises is lost.
    """

    def __init__(self, function: HostFunction) -> None:
        self.pointer = _HOST_FUNCTION(lambda argument: function(argument or 0))


class CudaDriver:
    """Stream operations on addresses as the device sees them; raises DriverError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def device_address(self, host_address: int) -> int:
        """What the device calls a place in pinned host memory."""
        found = ctypes.c_uint64()
        self._call(
            "cuMemHostGetDevicePointer_v2",
            ctypes.byref(found),
            ctypes.c_void_p(host_address),
            ctypes.c_uint(0),
        )
        return found.value

    def write_word(self, stream: int, address: int, value: int) -> None:
        """Store 32 bits, after all that is on the stream."""
        self._word("cuStreamWriteValue32_v2", stream, address, value, WRITE_AFTER_ALL_BEFORE)

    def wait_word(self, stream: int, address: int, value: int) -> None:
        """Hold the stream until the 32 bits there are ``value``."""
        self._word("cuStreamWaitValue32_v2", stream, address, value, WAIT_UNTIL_EQUAL)

    def call_host(self, stream: int, callback: HostCallback, argument: int) -> None:
        """Hold the stream while ``callback`` runs on the host."""
        self._call(
            "cuLaunchHostFunc",
            ctypes.c_void_p(stream),
            callback.pointer,
            ctypes.c_void_p(argument),
        )

    def _word(self, name: str, stream: int, address: int, value: int, flags: int) -> None:
        self._call(
            name,
            ctypes.c_void_p(stream),
            ctypes.c_uint64(address),
            ctypes.c_uint32(value),
            ctypes.c_uint(flags),
        )

    def _call(self, name: str, *arguments: object) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:  # a driver before CUDA 11.7
            raise DriverError(name, -1) from error
        code = function(*arguments)
        if code != 0:
            raise DriverError(name, code)


@functools.cache
def cuda_driver() -> CudaDriver:
    """The driver of this process; OSError where there is none."""
    return CudaDriver(ctypes.CDLL("libcuda.so.1"))


def current_stream() -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream().cuda_stream)

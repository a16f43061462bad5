"""The few calls of the CUDA driver that torch does not offer, through ``libcuda.so.1``.

Stores to and waits for a 32-bit word of mapped host memory, and host functions, each in the order
of a stream; all three may be captured into a CUDA graph. The runtime's Python bindings would do
but for two things: they may be absent, and their host function frees its argument after the first
call, so that a second replay of a graph crashes.

Registration of host memory, which torch offers through ``cudart()``: there a refusal would stay
behind as the runtime's last error, and the next kernel launch would complain of it.

Ordering: a store to a word is a release for all that the stream did before it (the driver's default
flag), and what follows a wait on the stream sees what the host wrote before the awaited value.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

import torch

WAIT_UNTIL_EQUAL = 0x1  # CU_STREAM_WAIT_VALUE_EQ
WRITE_AFTER_ALL_BEFORE = 0x0  # CU_STREAM_WRITE_VALUE_DEFAULT: with a memory barrier
KERNEL_EXEC_TIMEOUT = 17  # a CUdevice_attribute
PORTABLE, MAPPED = 0x1, 0x2  # of CU_MEMHOSTREGISTER: for all contexts, and in the GPU's addresses

HostFunction = Callable[[int], None]
_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class DriverError(RuntimeError):
    """A call of the driver was refused; the text says which, why, and with what CUresult."""


class HostCallback:
    """A Python function as the driver calls it, with an integer. Keep it while a graph holds it.

    It runs on a thread of the driver and takes Python's lock; it may call nothing of CUDA. What it
    raises is lost.
    """

    def __init__(self, function: HostFunction) -> None:
        self.pointer = _HOST_FUNCTION(lambda argument: function(argument or 0))


class CudaDriver:
    """Calls of the driver; each raises DriverError.

    Stream operations take addresses as the device sees them, registration as the host does.
    """

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

    def limits_kernels(self, device: int) -> bool:
        """Whether kernels on CUDA device ``device`` may run for a limited time only."""
        found = ctypes.c_int()
        self._call(
            "cuDeviceGetAttribute",
            ctypes.byref(found),
            ctypes.c_int(KERNEL_EXEC_TIMEOUT),
            ctypes.c_int(device),
        )
        return found.value != 0

    def current_context(self) -> int:
        """The context of this thread, which must have one."""
        found = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(found))
        assert found.value is not None
        return found.value

    @contextlib.contextmanager
    def inside(self, context: int) -> Iterator[None]:
        """Within, this thread's calls are for ``context``."""
        self._call("cuCtxPushCurrent_v2", ctypes.c_void_p(context))
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self._call("cuCtxPopCurrent_v2", ctypes.byref(popped))

    def register(self, address: int, num_bytes: int) -> None:
        """Pin host memory and let the device read it where it lies; refused, it is as it was."""
        self._call(
            "cuMemHostRegister_v2",
            ctypes.c_void_p(address),
            ctypes.c_size_t(num_bytes),
            ctypes.c_uint(PORTABLE | MAPPED),
        )

    def unregister(self, address: int) -> None:
        """Undo :meth:`register`."""
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))

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
            raise DriverError(f"{name} failed: this driver does not have it") from error
        code = function(*arguments)
        if code != 0:
            raise DriverError(f"{name} failed: {self._reason(code)} (CUDA error {code})")

    def _reason(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        return (text.value or b"unknown error").decode()


@functools.cache
def cuda_driver() -> CudaDriver:
    """The driver of this process; OSError where there is none."""
    return CudaDriver(ctypes.CDLL("libcuda.so.1"))


def current_stream() -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream().cuda_stream)

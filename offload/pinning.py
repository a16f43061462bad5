"""Pins memory that exists already, so that the GPU copies from it at full speed and reads it.

Pinned memory is given its place in the GPU's address space at the address that it has on the host
(unified addressing on 64-bit systems): kernels take it as it is. torch asks the driver what an
address is, whoever has registered it: ``is_pinned()`` of a tensor there is true, and
``copy_(non_blocking=True)`` returns at once.

The driver is called by ctypes rather than torch's ``cudart()``: a refusal through the runtime would
stay behind as its last error, and the next kernel launch would complain of it.

Ordering: memory is registered once its pages exist, for the driver makes them one after the other
(1.3 GB/s), and unregistered before it goes back to the system, when no copy is under way. Any
thread may call; several register at a time.
"""

import contextlib
import ctypes
import functools
import weakref
from collections.abc import Iterator

import torch

PORTABLE, MAPPED = 0x1, 0x2  # of CU_MEMHOSTREGISTER: for all contexts, and in the GPU's addresses
PAGE = 4096


class PinError(RuntimeError):
    """The driver does not pin this memory; the text says why."""


class PinnedMemory:
    """Pieces of memory that are registered with the driver until :meth:`release`.

    ``owner`` holds the memory: when it is dropped, or the process ends, what is still registered is
    released first.
    """

    def __init__(self, owner: object) -> None:
        self._driver = _driver()
        self._context = self._driver.context()
        self._addresses: list[int] = []
        weakref.finalize(owner, _release, self._driver, self._context, self._addresses)

    def pin(self, address: int, num_bytes: int) -> None:
        """Register whole pages: those of ``num_bytes`` at ``address``, which begins one.

        PinError if the driver refuses; the memory stays as it was.
        """
        assert address % PAGE == 0 and num_bytes > 0
        with self._driver.inside(self._context):
            self._driver.register(address, -(-num_bytes // PAGE) * PAGE)
        self._addresses.append(address)  # a list's append needs no lock

    def release(self) -> None:
        """Unregister everything, once the GPU has done all that it was asked for."""
        torch.cuda.synchronize()
        _release(self._driver, self._context, self._addresses)


class _Driver:
    """The driver's calls around registration."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def context(self) -> int:
        """The context of this thread, that of torch."""
        torch.cuda.synchronize()  # makes it, and makes it this thread's
        found = ctypes.c_void_p()
        self._check(self._library.cuCtxGetCurrent(ctypes.byref(found)))
        assert found.value is not None
        return found.value

    @contextlib.contextmanager
    def inside(self, context: int) -> Iterator[None]:
        """Within, this thread's calls are for ``context``."""
        self._check(self._library.cuCtxPushCurrent_v2(ctypes.c_void_p(context)))
        try:
            yield
        finally:
            popped = ctypes.c_void_p()
            self._check(self._library.cuCtxPopCurrent_v2(ctypes.byref(popped)))

    def register(self, address: int, num_bytes: int) -> None:
        self._check(
            self._library.cuMemHostRegister_v2(
                ctypes.c_void_p(address),
                ctypes.c_size_t(num_bytes),
                ctypes.c_uint(PORTABLE | MAPPED),
            )
        )

    def unregister(self, address: int) -> None:
        self._check(self._library.cuMemHostUnregister(ctypes.c_void_p(address)))

    def _check(self, code: int) -> None:
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(ctypes.c_int(code), ctypes.byref(text))
        raise PinError(f"{(text.value or b'unknown error').decode()} (CUDA error {code})")


@functools.cache
def _driver() -> _Driver:
    return _Driver(ctypes.CDLL("libcuda.so.1"))


def _release(driver: _Driver, context: int, addresses: list[int]) -> None:
    """Idempotent; at the end of the process the driver may be gone, and with it what it held."""
    with contextlib.suppress(PinError), driver.inside(context):
        while addresses:
            driver.unregister(addresses.pop())

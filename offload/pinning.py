"""Pins memory that exists already, so that the GPU copies from it at full speed and reads it.

Pinned memory is given its place in the GPU's address space at the address that it has on the host
(unified addressing on 64-bit systems): kernels take it as it is. torch asks the driver what an
address is, whoever has registered it: ``is_pinned()`` of a tensor there is true, and
``copy_(non_blocking=True)`` returns at once.

Ordering: memory is registered once its pages exist, for the driver makes them one after the other
(1.3 GB/s), and unregistered before it goes back to the system, when no copy is under way. Any
thread may call; several register at a time.
"""

import contextlib
import weakref

import torch

from offload.cuda_driver import CudaDriver, DriverError, cuda_driver

PAGE = 4096


class PinnedMemory:
    """Pieces of memory that are registered with the driver until :meth:`release`.

    ``owner`` holds the memory: when it is dropped, or the process ends, what is still registered is
    released first.
    """

    def __init__(self, owner: object) -> None:
        torch.cuda.synchronize()  # makes torch's context, and makes it this thread's
        self._driver = cuda_driver()
        self._context = self._driver.current_context()
        self._addresses: list[int] = []
        weakref.finalize(owner, _release, self._driver, self._context, self._addresses)

    def pin(self, address: int, num_bytes: int) -> None:
        """Register whole pages: those of ``num_bytes`` at ``address``, which begins one.

        DriverError if the driver refuses; the memory stays as it was.
        """
        assert address % PAGE == 0 and num_bytes > 0
        with self._driver.inside(self._context):
            self._driver.register(address, -(-num_bytes // PAGE) * PAGE)
        self._addresses.append(address)  # a list's append needs no lock

    def release(self) -> None:
        """Unregister everything, once the GPU has done all that it was asked for."""
        torch.cuda.synchronize()
        _release(self._driver, self._context, self._addresses)


def _release(driver: CudaDriver, context: int, addresses: list[int]) -> None:
    """Idempotent; at the end of the process the driver may be gone, and with it what it held."""
    with contextlib.suppress(DriverError), driver.inside(context):
        while addresses:
            driver.unregister(addresses.pop())

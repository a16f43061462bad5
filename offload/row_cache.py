"""Which cold experts host memory holds where it cannot hold all: the others are on disk.

Every cold expert has a row of its own, as elsewhere, but only rows that are held have pages. So an
expert always lies at the same address and a step adds up in the same order, whatever is held. A
step says which experts of a layer it needs, those that are missing are read, and who was not needed
for longest goes: a row that is let go gives its pages back to the system. (Where a huge page lies
in two rows, it goes back with the second of them.)

Ordering: one thread calls. ``begin`` lets go of rows and starts reads, on threads of their own, so
no worker may run then; ``finish`` waits for the reads, and until the next ``begin`` the rows may be
read. What an abandoned step was still reading is waited for by the next one.
"""

import ctypes
import functools
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Key = tuple[int, int]  # layer, expert


class RowCache:
    """Holds as many experts as it begins with, ``first``; ``let_go`` gives a row's pages back."""

    def __init__(self, first: Iterable[Key], let_go: Callable[[int, int], None]) -> None:
        self.num_read = 0  # experts, since the start
        self._held: OrderedDict[Key, None] = OrderedDict.fromkeys(first)
        self._let_go = let_go
        self._reads: dict[Key, Future[object]] = {}
        self._readers: ThreadPoolExecutor | None = None
        self.most = len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def read_with(self, read: Callable[[int, int], object], readers: ThreadPoolExecutor) -> None:
        """From now on ``read(layer, expert)`` fills a row; :meth:`close` ends ``readers``."""
        self._read, self._readers = read, readers

    def begin(self, layer: int, experts: Sequence[int]) -> None:
        """Start to read those of ``experts`` (at most ``most``) that are not held."""
        assert self._readers is not None and len(experts) <= self.most
        self._await_reads()  # an abandoned step's: whether they failed is nobody's concern now
        missing = []
        for key in ((layer, expert) for expert in experts):
            if key in self._held:
                self._held.move_to_end(key)
            else:
                missing.append(key)
        while len(self._held) + len(missing) > self.most:
            self._let_go(*self._held.popitem(last=False)[0])
        for key in missing:
            self._reads[key] = self._readers.submit(self._read, *key)

    def finish(self) -> None:
        """Return when all that was begun is there; raises what a read has raised."""
        for error in self._await_reads():
            raise error

    def close(self) -> None:
        """End the reads; nothing can be begun any more."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
            self._readers = None

    def _await_reads(self) -> list[BaseException]:
        errors = []
        for key, read in list(self._reads.items()):
            error = read.exception()
            del self._reads[key]
            if error is None:
                self._held[key] = None
                self.num_read += 1
            else:
                self._let_go(*key)  # it may be there in part
                errors.append(error)
        return errors


def give_back_pages(row: torch.Tensor) -> None:
    """Let the system have the whole pages of a contiguous tensor in host memory; they read as 0."""
    begin = -(-row.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (row.data_ptr() + row.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        _madvise()(begin, end - begin, mmap.MADV_DONTNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call

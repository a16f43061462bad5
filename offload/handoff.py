"""Ringing and awaiting the CPU workers from a GPU stream: one protocol, four ways to speak it.

The protocol is that of :mod:`cpu_kernels.worker`: 0 to DONE_BELL, then job k to DOORBELL; the job
is done when DONE_BELL is k. ``ring`` and ``wait`` are put on torch's current stream and act when
the stream comes to them; by all ways but Python's a CUDA graph may hold them. Who feeds
a pool so keeps its workers awake (``WorkerPool.awake``), rings nothing from Python meanwhile, and
has a pool whose caller does not work.

Ordering: what the stream wrote to mapped host memory before ``ring`` is seen by the workers, who
acquire the bell; what they wrote before DONE_BELL is seen by what follows ``wait`` on the stream.
The driver's store has a barrier for all earlier work of the stream, the 0 in DONE_BELL too; a
kernel's is a release after all of its programs' stores (:mod:`gpu_kernels.bell`). A pool
that fails is passed by: :func:`await_stream` stores the awaited words itself.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.compiled import kernels
from cpu_kernels.watchdog import PATIENCE_S, Watchdog
from cpu_kernels.worker import DONE_BELL, DOORBELL, FOREVER, NUM_WORDS, STOP
from fiddler.errors import WorkerError
from gpu_kernels.host_words import Bell, Ring
from offload.cuda_driver import HostCallback, cuda_driver, current_stream
from offload.handoff_probe import Way
from offload.worker_errors import worker_error, workers_errors
from offload.worker_pool import FedWorkers

Words = npt.NDArray[np.int64]

POLL_S = 20e-6  # the kernel makes about 70 of it
PASS_S = 100e-6  # how long an awaited word stands while a stream is helped past a dead pool
LINE_WORDS = 16  # int64 in the two cache lines of a word


class HandOff(Protocol):
    """How a stream hands jobs to a pool; see the module.

    What a kernel can do that runs anyhow is spared the stream: an operation of its own each.
    """

    def rung(self, number: int) -> Ring | None:
        """What the kernel in front of ``ring`` has to do for it."""
        ...

    def awaited(self, number: int) -> Bell | None:
        """What the kernel behind ``wait`` has to wait for before it reads the results."""
        ...

    def ring(self, number: int) -> None:
        """Start job ``number`` after what is on the current stream so far."""
        ...

    def wait(self, number: int) -> None:
        """What comes on the stream later sees the results of job ``number``.

        Where ``awaited`` says so, only the kernel that is given it.
        """
        ...


class KernelHandOff:
    """By kernels that store and wait: the one that publishes the work, the one that collects it.

    A kernel that waits counts as running, so this is for devices that set kernels no time limit.
    """

    def __init__(self, words: Words) -> None:
        """``words`` lie in pinned memory."""
        self._doorbell, self._done_bell = _word(words, DOORBELL), _word(words, DONE_BELL)
        self._num_done = torch.zeros(1, dtype=torch.int32, device="cuda")

    def rung(self, number: int) -> Ring | None:
        return Ring(self._done_bell, Bell(self._doorbell, number), self._num_done)

    def awaited(self, number: int) -> Bell | None:
        return Bell(self._done_bell, number)

    def ring(self, number: int) -> None:
        """The kernel before has rung."""

    def wait(self, number: int) -> None:
        """The kernel behind waits."""


class ValueHandOff:
    """By the stream's own stores and waits; nothing of Python or the driver runs in between."""

    def __init__(self, words: Words) -> None:
        """``words`` lie in pinned memory."""
        self._driver = cuda_driver()
        address = self._driver.device_address(words.ctypes.data)
        self._doorbell, self._done_bell = address + 8 * DOORBELL, address + 8 * DONE_BELL
        self._clear = Ring(_word(words, DONE_BELL))

    def rung(self, number: int) -> Ring | None:
        return self._clear

    def awaited(self, number: int) -> Bell | None:
        return None

    def ring(self, number: int) -> None:
        # the lower half: the upper is always 0
        self._driver.write_word(current_stream(), self._doorbell, number)

    def wait(self, number: int) -> None:
        self._driver.wait_word(current_stream(), self._done_bell, number)


class HostBell:
    """The protocol spoken by a thread of the host that is none of the pool's callers."""

    def __init__(self, words: Words) -> None:
        self._words, self._kernels = words, kernels()
        self._address: int = words.ctypes.data

    def ring(self, number: int) -> None:
        """Start a job now."""
        self._kernels.ring(self._address, number)

    def wait(self, number: int) -> None:
        """Return when DONE_BELL is ``number``, whoever stored it."""
        while self._words[DONE_BELL] != number:
            self._kernels.wait_while(self._address, DONE_BELL, 0, FOREVER)
            time.sleep(0)


class _HostHandOff:
    """The host does it all."""

    def rung(self, number: int) -> Ring | None:
        return None

    def awaited(self, number: int) -> Bell | None:
        return None


class HostFunctionHandOff(_HostHandOff):
    """By functions that the driver calls on a thread of its own; they take Python's lock."""

    def __init__(self, words: Words) -> None:
        bell = HostBell(words)
        self._driver = cuda_driver()
        self._ring, self._wait = HostCallback(bell.ring), HostCallback(bell.wait)

    def ring(self, number: int) -> None:
        self._driver.call_host(current_stream(), self._ring, number)

    def wait(self, number: int) -> None:
        self._driver.call_host(current_stream(), self._wait, number)


class EagerHandOff(_HostHandOff):
    """By Python, which waits for the stream first: no graph can hold it."""

    def __init__(self, workers: FedWorkers, synchronize: Callable[[], None]) -> None:
        self._workers, self._synchronize = workers, synchronize

    def ring(self, number: int) -> None:
        self._synchronize()
        with workers_errors():
            self._workers.ring(number)

    def wait(self, number: int) -> None:
        with workers_errors():
            self._workers.wait()


def make_hand_off(way: Way, workers: FedWorkers) -> HandOff:
    """The ``way`` for a pool on the current CUDA device."""
    if way == "eager":
        return EagerHandOff(workers, lambda: torch.cuda.current_stream().synchronize())
    if way == "hostfunc":
        return HostFunctionHandOff(workers.words)
    return KernelHandOff(workers.words) if way == "kernel" else ValueHandOff(workers.words)


def _word(words: Words, index: int) -> torch.Tensor:
    return torch.from_numpy(words[index : index + 1])


def pinned_words() -> Words:
    """Words for a pool that a GPU feeds; the array keeps the pinned memory."""
    room: Words = torch.zeros(NUM_WORDS + LINE_WORDS, dtype=torch.int64, pin_memory=True).numpy()
    first = -(room.ctypes.data // 8) % LINE_WORDS
    return room[first : first + NUM_WORDS]


def await_stream(
    is_done: Callable[[], bool],
    is_idle: Callable[[], bool],
    words: Words,
    numbers: Iterable[int],
    patience_s: float = PATIENCE_S,
) -> None:
    """Return when what was put on a stream that feeds a pool is done; WorkerError if it failed.

    An interrupt is raised only then. After an error the stream is idle, with wrong results: each
    awaited word was stored for it, and the pool is not to be used again. ``numbers`` are the jobs
    that the stream may wait for.
    """
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            _watch(is_done, is_idle, words, numbers, patience_s)
            break
        except KeyboardInterrupt as error:  # workers that park now would hold the stream for ever
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _watch(
    is_done: Callable[[], bool],
    is_idle: Callable[[], bool],
    words: Words,
    numbers: Iterable[int],
    patience_s: float,
) -> None:
    watchdog = Watchdog(words, patience_s)
    while not is_done():
        complaint = "a CPU worker failed" if words[STOP] else watchdog.complaint()
        if complaint:
            _help_past(is_idle, words, numbers, patience_s)
            raise worker_error(complaint)
        time.sleep(POLL_S)


def _help_past(
    is_idle: Callable[[], bool], words: Words, numbers: Iterable[int], patience_s: float
) -> None:
    """Store what the stream waits for until it has run through.

    That is the rung job, unless a late worker has cleared the bell in the meantime: then any of
    ``numbers`` in turn.
    """
    turn = itertools.cycle(numbers)
    deadline = time.monotonic() + max(patience_s, 1.0)
    while not is_idle():
        words[DONE_BELL] = words[DOORBELL] or next(turn)
        if time.monotonic() > deadline:
            raise WorkerError(
                "the GPU did not end a step after the CPU workers failed",
                hint="restart the program",
            )
        time.sleep(PASS_S)

"""A pool of persistent worker threads that run jobs; a job is started by one store to memory.

The threads live in compiled code, without the GIL. An idle worker spins for a while, because the
next job usually comes within a millisecond, then parks in a condition variable and costs nothing.
"""

import functools
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiled import kernels
from cpu_kernels.crew import LOOK_S, Crew, aligned_words
from cpu_kernels.topology import can_pin, num_cores, read_machine, spread
from cpu_kernels.watchdog import PATIENCE_S, StandstillError, Watchdog
from cpu_kernels.worker import (
    DOORBELL,
    ERROR,
    FOREVER,
    GENERATION,
    JOB_HEADER,
    MAX_JOBS,
    MAX_WORKERS,
    NUM_WORDS,
    PARKED,
    PATIENCE,
    SPINS,
)

# With cores to spare a worker spins for 20 ms and then parks: between two layers of an eager GPU
# step 1 ms goes by, and waking parked threads through Python at each layer halved the speed.
SPIN_US_WITH_SPARE_CORES = 20_000.0
# Without, it parks at once, and a worker that waits for others offers its core after 10 us, else
# one layer of ten on a busy machine waited 8 ms for a thread that could not run. A thread that
# wakes goes first, one that has offered its core waits its turn: beside a busy process on 2 cores a
# job of 0.1 ms took 0.3 to 0.8 ms on average after 10 us, 11 ms after 1 ms of offers.
SPIN_US_WITHOUT = 10.0
POLITE_AFTER_US = 10.0


class StageError(RuntimeError):
    """A compiled stage has put ``code`` into the word ERROR; the pool goes on."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a stage of a CPU job failed with code {code}")
        self.code = code


def default_num_threads(cores: int) -> int:
    """Workers for a machine of ``cores``: two are left to Python and the driver from 8 cores on.

    16 spinning workers beside a busy caller on 16 cores fell from 165 to 9 GB/s. On few cores the
    caller works too, so all of them work.
    """
    if cores >= 8:
        return cores - 2
    return cores - 1 if cores >= 4 else cores


class WorkerPool:
    """Workers that run one job at a time, each its share; see :mod:`cpu_kernels.worker`.

    Ordering: one thread at a time calls ring, wait, add_job and close. Between wait and the next
    ring the caller alone owns the jobs and all that they point to; between ring and wait the
    workers do. Or a compiled loop or a GPU feeds ``words`` by the protocol of that module, with
    nothing rung from here at that time, within :meth:`awake`, and only if not ``caller_works``.

    A pool that is dropped ends its threads.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        *,
        caller_works: bool | None = None,
        spin_us: float | None = None,
        words: npt.NDArray[np.int64] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Start ``num_threads`` workers; None: a number that leaves room for the rest.

        ``caller_works``: worker 0 is whoever calls wait, so there is one thread less; None: if the
        pool would use every core. ``spin_us``: how long a worker waits awake. ``words``: NUM_WORDS
        int64 to share, for example in pinned memory; the pool sets and keeps them. ``patience_s``:
        how long the workers may stand still in a job before it is taken for a failure.
        """
        machine = read_machine()
        cores = num_cores(machine)
        num_threads = default_num_threads(cores) if num_threads is None else num_threads
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        if num_threads > MAX_WORKERS:
            raise ValueError(f"num_threads must be at most {MAX_WORKERS}, not {num_threads}")
        self.num_threads = num_threads
        self.caller_works = num_threads >= cores if caller_works is None else caller_works
        self.words = aligned_words() if words is None else _checked(words)
        self.words[:NUM_WORDS] = 0
        self._crew = Crew(self.words, num_threads)
        num_busy = num_threads + (not self.caller_works)  # a caller that waits spins too
        self._crew.set_patience(*_patience(spin_us, has_spare_cores=cores > num_busy))
        self._free_numbers: list[int] = []
        self._rung = 0
        self._patience_s, self._piece_s = patience_s, 0.0
        self._is_open = True
        cpus = spread(machine, num_threads) if can_pin() else None
        threads = [
            threading.Thread(
                target=self._crew.run,
                args=(worker, cpus[worker] if cpus else None),
                name=f"worker-{worker}",
                daemon=True,
            )
            for worker in range(self.caller_works, num_threads)
        ]
        self._finalizer = weakref.finalize(self, _end, self._crew, threads)
        for thread in threads:
            thread.start()  # may fail: the finalizer ends those that run

    @property
    def has_failed(self) -> bool:
        """Whether a worker has failed, which ends the pool: ring and wait raise what it raised."""
        return self._crew.failure is not None

    @property
    def error_address(self) -> int:
        """Where a stage stores a code other than 0 to complain; 8 bytes, atomically."""
        return self._crew.address + 8 * ERROR

    def add_job(self, record: npt.NDArray[Any], owner: object = None) -> int:
        """Make a record of one element a job; returns its number, 1 or more, for :meth:`ring`.

        Its dtype starts with JOB_HEADER. The pool keeps the array, whose contents may change while
        the job does not run, and ``owner``, which is to keep what it points to.
        """
        header = [(name, record.dtype[name].type) for name in (record.dtype.names or ())[:2]]
        assert header == JOB_HEADER, record.dtype
        assert record.size == 1 and record["num_phases"].item() >= 1, record
        assert record["stage"].item() != 0, "a job needs a stage"
        crew = self._crew
        number = self._free_numbers.pop() if self._free_numbers else len(crew.jobs) + 1
        assert number < MAX_JOBS, "too many jobs"
        crew.jobs[number], crew.table[number] = (record, owner), record.ctypes.data
        return number

    def remove_job(self, number: int) -> None:
        """Forget a job that does not run; its number may be given to another.

        A pool that has failed keeps it: a worker may be late.
        """
        assert number != self._rung, "the job runs"
        if not self.has_failed:
            del self._crew.jobs[number]
            self._free_numbers.append(number)

    def ring(self, number: int, piece_s: float = 0.0) -> None:
        """Start a job and return at once. Raises the exception of a worker that failed before.

        ``piece_s``: how much longer than other jobs it may take without a sign that it goes on.
        """
        crew = self._crew
        if crew.failure is not None:
            raise crew.failure
        assert self._is_open, "the pool is closed"
        assert not self._rung, "the job before has not been waited for"
        assert number in crew.jobs, number
        self._rung, self._piece_s = number, piece_s
        if crew.kernels.ring(crew.address, number):
            crew.wake()

    def wait(self) -> None:
        """Return when the rung job is done; if the caller works, it works here.

        Raises the exception of a worker that failed, which ends the pool, StandstillError, which
        does too, or StageError.
        """
        if self._rung:
            if self.words[PARKED]:  # an interrupt may have kept ring from it
                self._crew.wake()
            if self.caller_works:
                self._crew.work_as_caller(self._rung)
            else:
                self._crew.wait_done(self._patience_s + self._piece_s)
            self._rung = 0
        if self._crew.failure is not None:
            raise self._crew.failure
        code = self.words[ERROR]
        if code:
            self.words[ERROR] = 0
            raise StageError(int(code))

    def wake(self) -> None:
        """Let parked workers spin again for a while."""
        self._crew.wake()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within, all workers spin: for feeders that cannot wake them."""
        with self._crew.awake():
            yield

    def close(self) -> None:
        """Let a started job end, stop and join the threads. Safe to call again.

        Threads that stand still are left, and end when they can.
        Raises what :meth:`wait` would, if it was not called for the job.
        """
        try:
            if self._is_open and self._rung:
                self.wait()
            elif self._is_open and self.words[DOORBELL]:  # another feeder's
                self.wake()
                self._crew.wait_done(self._patience_s)
        finally:
            self._is_open = False
            self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _end(crew: Crew, threads: list[threading.Thread]) -> None:
    crew.stop()
    watchdog = Watchdog(crew.words, PATIENCE_S)
    for thread in threads:
        is_own = thread is threading.current_thread()  # a worker collects the garbage
        while thread.is_alive() and not is_own:
            if isinstance(crew.failure, StandstillError) or watchdog.complaint():
                return
            thread.join(LOOK_S)


def _checked(words: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    fits = words.dtype == np.int64 and words.ndim == 1 and len(words) >= NUM_WORDS
    if not fits or not words.flags.c_contiguous or words.ctypes.data % 8:
        raise ValueError(f"words must be at least {NUM_WORDS} aligned int64 in one piece")
    return words


def _patience(spin_us: float | None, *, has_spare_cores: bool) -> tuple[int, int]:
    """Looks at a bell before sleep, and how many of them are followed by a mere pause."""
    if spin_us is None:
        spin_us = SPIN_US_WITH_SPARE_CORES if has_spare_cores else SPIN_US_WITHOUT
    pause_us, offer_us = _look_us()
    if has_spare_cores:
        looks = int(spin_us / pause_us)
        return looks, looks
    pauses = int(min(spin_us, POLITE_AFTER_US) / pause_us)
    return pauses + int(max(0.0, spin_us - POLITE_AFTER_US) / offer_us), pauses


@functools.cache
def _look_us() -> tuple[float, float]:
    """What a look at a bell costs with a pause (10 to 60 ns by make of core), and with an offer."""
    words = aligned_words()
    looks = words[SPINS] = 1000

    def best_us(patience: int) -> float:
        words[PATIENCE] = patience
        times = []
        for _ in range(3):
            started = time.perf_counter()
            kernels().wait_while(words.ctypes.data, GENERATION, 0, FOREVER)
            times.append(time.perf_counter() - started)
        return min(times) / looks * 1e6

    return best_us(looks + 1), best_us(0)

"""The Python side of the workers: what a thread does between two stays in compiled code."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiled import kernels
from cpu_kernels.watchdog import StandstillError, Watchdog
from cpu_kernels.worker import (
    ASLEEP,
    DONE_BELL,
    DOORBELL,
    FINISHED,
    FOREVER,
    MAX_JOBS,
    NUM_WORDS,
    PARKED,
    PATIENCE,
    SPINS,
    STOP,
    STOPPED,
)

LOOK_S = 0.25  # a caller who sleeps looks so often whether the workers get on
# So often a caller offers its core before it is in Python again, where it hears Ctrl-C: that is
# 0.1 ms, or 0.8 s if each offer is taken for 3 ms.
CALLER_OFFERS = 256


class Crew:
    """What the worker threads and their caller share: words, jobs, places to sleep, a failure.

    Its threads keep it, so all that a job points to outlives a worker that stands still.

    Ordering: :mod:`cpu_kernels.worker` has the words' rules. ``jobs``, which keeps what ``table``
    points to and its owner, is the caller's alone. ``_num_wakes``, ``_num_held`` and
    ``_num_parked`` belong to the lock of ``_may_go``; a worker parks after it has told PARKED and
    then seen no bell, so a ring either is seen by it or sees it, and then has to take the lock to
    wake it. ``failure`` is written before STOP.
    """

    def __init__(self, words: npt.NDArray[np.int64], num_workers: int) -> None:
        self.num_workers = num_workers
        self.kernels = kernels()
        self.words = words
        self.address: int = words.ctypes.data
        self.table = np.zeros(MAX_JOBS, np.int64)
        self.table_address: int = self.table.ctypes.data
        self.jobs: dict[int, tuple[npt.NDArray[Any], object]] = {}
        self.failure: BaseException | None = None
        self._may_go = threading.Condition()
        self._is_done = threading.Condition()
        self._num_wakes = self._num_held = self._num_parked = 0
        self._spins = self._caller_looks = 0

    def set_patience(self, spins: int, patience: int) -> None:
        """Set the looks at a bell before sleep; the first ``patience`` with a mere pause."""
        self._spins, self._caller_looks = spins, patience + CALLER_OFFERS
        self.words[SPINS], self.words[PATIENCE] = spins, patience

    def run(self, worker: int, cpu: int | None) -> None:
        """The life of one worker thread, tied to ``cpu`` if given."""
        try:
            if cpu is not None:
                with contextlib.suppress(OSError):  # a sandbox may forbid it: slower, not wrong
                    os.sched_setaffinity(0, {cpu})  # 0: this thread
            self._work(worker)
        except BaseException as failure:
            self._fail(failure)

    def work_as_caller(self, number: int) -> None:
        """Do worker 0's share of a job on this thread; returns when the job is done or failed.

        After an interrupt, which comes before our share or after it, it may be called again. Others
        who stand still are waited for without end: compiled code, which could not be entered again
        in the middle of a job, waits for them.
        """
        if self.words[DOORBELL] == number:
            self.kernels.work_as_caller(self.address, self.table_address, number, self.num_workers)

    def wait_done(self, patience_s: float) -> None:
        """Return when the rung job is done or a worker has failed; sleeps if it takes long.

        All have failed if none has got on for ``patience_s``.
        """
        if self._hears_done():
            return
        self._stay_until_done()
        watchdog = Watchdog(self.words, patience_s)
        while not self._has_ended():
            if complaint := watchdog.complaint():
                self._fail(StandstillError(complaint))
            else:
                self._stay_until_done()

    def wake(self) -> None:
        """Let all parked workers spin again."""
        with self._may_go:
            self._num_wakes += 1
            self._may_go.notify_all()

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """No worker parks within; the parked ones wake."""
        self._hold(1)
        try:
            yield
        finally:
            self._hold(-1)

    def stop(self) -> None:
        """Make all workers end; a job that runs is left unfinished."""
        self.kernels.announce(self.address, STOP, 1, DOORBELL)
        self.wake()
        with self._is_done:
            self._is_done.notify_all()

    def _hears_done(self) -> bool:
        return self.kernels.wait_while(self.address, DONE_BELL, 0, self._caller_looks) != 0

    def _stay_until_done(self) -> None:
        """Spin if workers do not park, else sleep; returns before the job is done if it is long."""
        if self.words[SPINS] == FOREVER:
            self._hears_done()
        else:
            self._sleep_until_done()

    def _sleep_until_done(self) -> None:
        with self._is_done:
            try:
                self.kernels.announce(self.address, ASLEEP, 1, DONE_BELL)
                self._is_done.wait_for(self._has_ended, LOOK_S)
            finally:
                self.words[ASLEEP] = 0

    def _hold(self, change: int) -> None:
        with self._may_go:
            self._num_held += change
            self.words[SPINS] = FOREVER if self._num_held else self._spins
            self._may_go.notify_all()

    def _fail(self, failure: BaseException) -> None:
        self.failure = self.failure or failure
        self.stop()  # the others would wait for us

    def _has_ended(self) -> bool:
        return bool(self.words[DONE_BELL] or self.words[STOP])

    def _work(self, worker: int) -> None:
        while True:
            reason = self.kernels.worker_loop(
                self.address, self.table_address, worker, self.num_workers
            )
            if reason == FINISHED:
                with self._is_done:
                    self._is_done.notify_all()
            elif reason == STOPPED:
                return
            else:
                self._park()

    def _park(self) -> None:
        with self._may_go:
            wakes = self._num_wakes
            self._tell_parked(1)
            self._may_go.wait_for(lambda: self._must_go() or self._num_wakes != wakes)
            self._tell_parked(-1)

    def _tell_parked(self, change: int) -> None:
        self._num_parked += change
        self.kernels.announce(self.address, PARKED, self._num_parked, DOORBELL)

    def _must_go(self) -> bool:
        return bool(self._num_held or self.words[DOORBELL] or self.words[STOP])


def aligned_words() -> npt.NDArray[np.int64]:
    """Zeroed words at a multiple of 128 bytes, so that each has its lines to itself."""
    room = np.zeros(NUM_WORDS + 16, np.int64)
    first = -(room.ctypes.data // 8) % 16
    return room[first : first + NUM_WORDS]

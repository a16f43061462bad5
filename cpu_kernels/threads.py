"""Persistent worker threads: Python threads that live in GIL-free kernels while there is work.

An idle worker spins for a while, because the next layer usually comes within a millisecond, then
parks in a condition variable and costs nothing.
"""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.compiled import Kernels
from cpu_kernels.worker import (
    ASLEEP,
    DONE,
    FINISHED,
    NUM_WORDS,
    PATIENCE,
    STOP,
    STOPPED,
    SUBMITTED,
)

# Pauses of a waiting thread. With cores to spare it spins for 10 to 50 ms (10 to 50 ns a pause, by
# make of core) and then parks: between two layers of an eager GPU step 1 ms goes by, and waking
# parked threads through Python at each layer halved the speed. Without spare cores it is polite
# soon: else one layer of ten on a busy machine waited 8 ms for a thread that could not run.
PATIENCE_WITH_SPARE_CORES = 1_000_000
PATIENCE_WITHOUT = 200


def num_physical_cores() -> int:
    """Cores this process may use: affinity and container quota count, hyper-threads do not."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cpus = affinity(0) if affinity else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit = cores_of_quota(quota.read_text()) if quota.exists() else None
    return max(1, min(len(siblings), limit or len(siblings)))


def cores_of_quota(cpu_max: str) -> int | None:
    """Whole cores that a cgroup's ``cpu.max`` allows ("200000 100000": 2); None: all."""
    quota, period = cpu_max.split()
    return None if quota == "max" else max(1, int(quota) // int(period))


def default_num_threads(cores: int) -> int:
    """Workers for a machine of ``cores``: two are left to Python and the driver from 8 cores on.

    16 spinning workers beside a busy caller on 16 cores fell from 165 to 9 GB/s. On few cores the
    caller mostly sleeps while the workers run, so all of them work.
    """
    if cores >= 8:
        return cores - 2
    return cores - 1 if cores >= 4 else cores


class WorkerPool:
    """``num_threads`` threads in ``kernels.worker_loop``, fed through ``words`` and ``jobs``.

    Ordering: one thread at a time calls start, wait and close. Between wait and the next start the
    caller alone owns ``jobs`` and all that it points to; between start and wait the workers do. The
    words' own rules are in :mod:`cpu_kernels.worker`.
    """

    def __init__(self, kernels: Kernels, jobs: np.ndarray[Any, Any], num_threads: int) -> None:
        assert num_threads >= 1, num_threads
        self.num_threads = num_threads
        self._kernels = kernels
        self._jobs = jobs
        self._words = np.zeros(NUM_WORDS, np.int64)
        self._num_started = 0
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._finished = threading.Condition()
        has_spare_cores = num_physical_cores() > num_threads
        self._max_spins = PATIENCE_WITH_SPARE_CORES if has_spare_cores else PATIENCE_WITHOUT
        self._words[PATIENCE] = self._max_spins
        self._threads = [
            threading.Thread(target=self._run, args=(n,), name=f"expert-{n}", daemon=True)
            for n in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def start(self) -> None:
        """Let the workers run ``jobs[0]``; returns at once. Raises the exception of a worker."""
        self._raise_failure()
        assert self._threads, "the pool is closed"
        assert self._is_done(), "the job before has not been waited for"
        self._num_started += 1
        self._kernels.atomic_store(self._words, SUBMITTED, self._num_started)
        with self._wake:
            self._wake.notify_all()

    def wait(self) -> None:
        """Return when the started job is done; raise the exception of a worker that failed."""
        target = self._num_started * self.num_threads
        if not self._kernels.wait_for_word(self._words, DONE, target, self._max_spins):
            self._sleep_until_done()
        self._raise_failure()

    def close(self) -> None:
        """Let the started job end, then stop and join all threads. Safe to call again."""
        try:
            if self._threads:
                self.wait()
        finally:
            self._stop()
            for thread in self._threads:
                thread.join()
            self._threads = []

    def _is_done(self) -> bool:
        return int(self._words[DONE]) >= self._num_started * self.num_threads

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _sleep_until_done(self) -> None:
        with self._finished:
            self._kernels.atomic_store(self._words, ASLEEP, 1)
            self._finished.wait_for(lambda: self._is_done() or self._failure is not None)
            self._kernels.atomic_store(self._words, ASLEEP, 0)

    def _stop(self) -> None:
        self._kernels.atomic_store(self._words, STOP, 1)
        with self._wake:
            self._wake.notify_all()

    def _run(self, index: int) -> None:
        try:
            self._kernels.start_worker()
            self._work(index)
        except BaseException as failure:
            self._failure = failure
            self._stop()  # the others would wait for us between the stages
            with self._finished:
                self._finished.notify_all()

    def _work(self, index: int) -> None:
        loop, reason, seen = self._kernels.worker_loop, FINISHED, 0
        while reason != STOPPED:
            reason, seen = loop(
                self._words, self._jobs, seen, index, self.num_threads, self._max_spins
            )
            if reason == FINISHED:
                with self._finished:
                    self._finished.notify_all()
            else:
                self._park(seen)

    def _park(self, seen: int) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._words[SUBMITTED] > seen or self._words[STOP] != 0)

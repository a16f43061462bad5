"""Pools of every make, jobs that check the pool which runs them, and a feeder without Python."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from cpu_kernels.addresses import i64_array
from cpu_kernels.compiled import stage_address
from cpu_kernels.intrinsics import atomic_add, atomic_load, pause, store_release
from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import DONE_BELL, DOORBELL, JOB_HEADER, NUM_WORDS

MODES = [(1, True), (1, False), (2, True), (2, False), (3, True), (3, False)]
modes = pytest.mark.parametrize(("num_threads", "caller_works"), MODES)

HEADER_BYTES = 16
# stamp: of this run; board: of [phases, workers] int64; faults: address of a count.
CHECK_JOB = np.dtype([*JOB_HEADER, ("stamp", "i8"), ("board", "i8"), ("faults", "i8")])
MAX_PHASES = 6


def make_check_stage() -> Callable[..., None]:
    """Writes stamp + phase to its place, after it has found the others' words of the phase before.

    Workers dawdle by a number that depends on all of them, so that each is late at times.
    """

    def check_stage(job, phase, worker, num_workers):  # type: ignore[no-untyped-def]
        stamp, board_address, faults = i64_array(job + HEADER_BYTES, 3)
        board = i64_array(board_address, (phase + 1) * num_workers)
        if phase > 0:
            for other in range(num_workers):
                if board[(phase - 1) * num_workers + other] != stamp + phase - 1:
                    atomic_add(i64_array(faults, 1), 0, 1)
        for _ in range((stamp * 7919 + phase * 104729 + worker * 31) % 300):
            pause()
        if board[phase * num_workers + worker] == stamp + phase:  # done twice
            atomic_add(i64_array(faults, 1), 0, 1)
        board[phase * num_workers + worker] = stamp + phase

    return check_stage


class CheckJob:
    """A job of a pool whose workers check each other."""

    def __init__(self, pool: WorkerPool) -> None:
        self._board = np.zeros((MAX_PHASES, pool.num_threads), np.int64)
        self._faults = np.zeros(1, np.int64)
        self.record = np.zeros(1, CHECK_JOB)
        self.record["stage"] = stage_address(make_check_stage)
        self.record["board"] = self._board.ctypes.data
        self.record["faults"] = self._faults.ctypes.data
        self.record["num_phases"] = 1
        self.number = pool.add_job(self.record)
        self._pool, self._stamp = pool, 0

    def start(self, num_phases: int = 2) -> None:
        self._stamp += 100
        self.record["stamp"], self.record["num_phases"] = self._stamp, num_phases
        self._pool.ring(self.number)

    def check(self) -> None:
        """All phases of the job have been run by all workers, in order."""
        num_phases = self.record["num_phases"].item()
        assert self._faults[0] == 0
        expected = self._stamp + np.arange(num_phases)
        assert (self._board[:num_phases] == expected[:, None]).all()

    def run(self, num_phases: int = 2) -> None:
        self.start(num_phases)
        self._pool.wait()
        self.check()


@numba.njit(nogil=True)
def feed(words_address: int, numbers: npt.NDArray[np.int64], counter: int, seen: Any) -> None:
    """Ring ``numbers`` one after the other as a GPU would; seen[n] = the word at ``counter``."""
    words = i64_array(words_address, NUM_WORDS)
    for n in range(len(numbers)):
        store_release(words, DONE_BELL, 0)
        store_release(words, DOORBELL, numbers[n])
        while atomic_load(words, DONE_BELL) != numbers[n]:
            pause()
        seen[n] = i64_array(counter, 1)[0]


COUNT_JOB = np.dtype([*JOB_HEADER, ("counter", "i8"), ("step", "i8")])


def make_count_stage() -> Callable[..., None]:
    """Adds ``step`` to the word at ``counter``, atomically."""

    def count_stage(job, phase, worker, num_workers):  # type: ignore[no-untyped-def]
        counter, step = i64_array(job + HEADER_BYTES, 2)
        atomic_add(i64_array(counter, 1), 0, step)

    return count_stage


def count_job(pool: WorkerPool, counter: npt.NDArray[np.int64], num_phases: int, step: int) -> int:
    stage = stage_address(make_count_stage)
    record = np.array([(stage, num_phases, counter.ctypes.data, step)], COUNT_JOB)
    return pool.add_job(record)


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process that never lets go of a core."""
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        hog.kill()
        hog.wait()

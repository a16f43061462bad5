"""A pool's workers, made to do what a test needs: run Python within a job, fail, or be asleep."""

import ctypes
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import JOB_HEADER, PARKED, SPINS

_STAGE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)
_made: list[Any] = []  # a worker that is late may still call any of them


def python_stage(work: Callable[[int, int, int], object]) -> int:
    """The address of a stage that is ``work(phase, worker, number of workers)``.

    To the pool it is a C function like any other. It must not raise, and must not wait for ever.
    """
    stage = _STAGE(lambda job, *place: work(*place))
    _made.append(stage)
    address = ctypes.cast(stage, ctypes.c_void_p).value
    assert address is not None
    return address


def add_python_job(
    pool: WorkerPool, work: Callable[[int, int, int], object], num_phases: int = 1
) -> int:
    return pool.add_job(np.array([(python_stage(work), num_phases)], JOB_HEADER))


def hold_layer(layer: Any, may_go: threading.Event) -> None:
    """Have worker 0 stand still in the job of an expert layer, until ``may_go`` or for a minute."""
    layer.record["stage"] = python_stage(lambda _, worker, __: worker == 0 and may_go.wait(60))


def fail_worker(pool: WorkerPool, failure: BaseException) -> None:
    """Have the last worker's thread raise ``failure`` in Python, the only place where it can.

    There it is between two stays in compiled code: all come back from that now, as if the bell had
    been silent for long. Within ``awake`` it has failed when this returns. Else no job may run: all
    are parked then, and it fails when a ring wakes it, for the others in the middle of a job.
    """
    crew = pool._crew
    compiled = crew.kernels

    def worker_loop(words: int, table: int, worker: int, num_workers: int) -> int:
        if worker == num_workers - 1:
            raise failure
        return compiled.worker_loop(words, table, worker, num_workers)

    crew.kernels = dataclasses.replace(compiled, worker_loop=worker_loop)
    pool.words[SPINS] = 0
    wait_until(lambda: crew.failure is failure or is_parked(pool))


def is_parked(pool: WorkerPool) -> bool:
    return int(pool.words[PARKED]) == pool.num_threads - pool.caller_works


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)

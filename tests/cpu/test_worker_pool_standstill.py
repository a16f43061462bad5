"""Workers that stand still in a job: noticed by who waits for it, and left."""

import _thread
import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
from pool_jobs import CheckJob

from cpu_kernels.threads import WorkerPool
from cpu_kernels.watchdog import StandstillError
from cpu_kernels.worker import JOB_HEADER, TAKEN
from tests.workers import add_python_job, python_stage, wait_until

awake_or_not = pytest.mark.parametrize("is_awake", [False, True])


def add_held_job(pool: WorkerPool, may_go: threading.Event) -> int:
    """One in which the last worker stands still."""
    return add_python_job(pool, lambda _, worker, n: worker == n - 1 and may_go.wait(60))


@awake_or_not
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_it_is_noticed_and_ends_the_pool(
    num_threads: int, is_awake: bool, may_go: threading.Event
) -> None:
    before = threading.active_count()
    pool = WorkerPool(num_threads, caller_works=False, patience_s=0.3)
    job, held = CheckJob(pool), add_held_job(pool, may_go)
    job.run()
    with pool.awake() if is_awake else nullcontext():
        began = time.monotonic()
        pool.ring(held)
        with pytest.raises(StandstillError, match=r"the CPU workers stood still for 0\.3 seconds"):
            pool.wait()
        assert 0.3 <= time.monotonic() - began < 5
    assert pool.has_failed
    for use in (job.start, pool.wait):
        with pytest.raises(StandstillError):
            use()
    pool.close()  # leaves the thread to itself
    assert threading.active_count() > before
    may_go.set()
    wait_until(lambda: threading.active_count() == before)


@awake_or_not
def test_jobs_that_go_on_slowly_are_waited_for(is_awake: bool) -> None:
    """Some in phases, some in pieces, and who rings one may know that a piece takes long."""
    with WorkerPool(2, caller_works=False, patience_s=0.8) as pool:

        def take_pieces(phase: int, worker: int, num_workers: int) -> None:
            for _ in range(6):
                time.sleep(0.2)
                pool.words[TAKEN] += worker

        phases = add_python_job(pool, lambda *_: time.sleep(0.2), num_phases=6)
        pieces = add_python_job(pool, take_pieces)
        long_piece = add_python_job(pool, lambda *_: time.sleep(1.2))
        with pool.awake() if is_awake else nullcontext():
            for number, piece_s in ((phases, 0.0), (pieces, 0.0), (long_piece, 5.0)):
                pool.ring(number, piece_s)
                pool.wait()
        CheckJob(pool).run()


@pytest.mark.usefixtures("interruptible")
@awake_or_not
def test_an_interrupt_is_heard_within_a_second(is_awake: bool, may_go: threading.Event) -> None:
    with WorkerPool(2, caller_works=False) as pool:
        held, interrupted = add_held_job(pool, may_go), list[float]()

        def interrupt() -> None:
            interrupted.append(time.monotonic())
            _thread.interrupt_main()

        with pool.awake() if is_awake else nullcontext():
            pool.ring(held)
            threading.Timer(0.3, interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                pool.wait()
            assert time.monotonic() - interrupted[0] < 1
        may_go.set()
        pool.wait()
        CheckJob(pool).run()


class Owner:
    """Of memory that a job points to."""


def test_what_a_late_worker_may_read_is_kept(may_go: threading.Event) -> None:
    pool, owner = WorkerPool(1, caller_works=False, patience_s=0.1), Owner()
    kept = weakref.ref(owner)
    stage = python_stage(lambda *_: may_go.wait(60))
    number = pool.add_job(np.array([(stage, 1)], JOB_HEADER), owner)
    pool.ring(number)
    with pytest.raises(StandstillError):
        pool.wait()
    pool.remove_job(number)
    pool.close()
    del pool, owner
    gc.collect()
    assert kept() is not None
    may_go.set()
    wait_until(lambda: gc.collect() >= 0 and kept() is None)  # the error's traceback is a cycle


def test_a_process_ends_all_the_same() -> None:
    """Also if the pool is never closed."""
    code = """
import threading
from cpu_kernels.threads import WorkerPool
from tests.workers import add_python_job
pools = [WorkerPool(2, caller_works=False, patience_s=0.1) for _ in range(2)]
for pool in pools:
    pool.ring(add_python_job(pool, lambda *_: threading.Event().wait()))
    try:
        pool.wait()
    except RuntimeError as error:
        print(error)
pools[0].close()
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == 2 * "the CPU workers stood still for 0.1 seconds\n"

"""How a pool begins, sleeps, wakes and ends."""

import gc
import threading
import time

import numpy as np
import pytest
from pool_jobs import MODES, CheckJob, count_job, feed, modes

from cpu_kernels.threads import WorkerPool, default_num_threads
from cpu_kernels.topology import num_cores, read_machine
from cpu_kernels.worker import DOORBELL
from tests.workers import fail_worker, is_parked, wait_until

# --- sleep ---


@modes
def test_idle_workers_park_cost_nothing_and_wake(num_threads: int, caller_works: bool) -> None:
    def nap_costs_s() -> float:
        busy_s = time.process_time()
        time.sleep(0.1)
        return time.process_time() - busy_s

    with WorkerPool(num_threads, caller_works=caller_works, spin_us=1000) as pool:
        job = CheckJob(pool)
        wait_until(lambda: is_parked(pool))
        # threads of earlier tests may still spin for a moment
        assert any(nap_costs_s() < 0.02 for _ in range(3))
        job.run()


def test_ringing_while_workers_fall_asleep() -> None:
    with WorkerPool(2, caller_works=False, spin_us=20) as pool:  # the caller falls asleep too
        job = CheckJob(pool)
        for pause_us in np.random.default_rng(1).integers(0, 200, 500):
            until = time.perf_counter_ns() + 1000 * int(pause_us)
            while time.perf_counter_ns() < until:
                pass
            job.run()


def test_wake_and_awake() -> None:
    counter = np.zeros(1, np.int64)
    with WorkerPool(2, caller_works=False, spin_us=1000) as pool:
        number = count_job(pool, counter, 1, 1)
        seen = np.zeros(1, np.int64)
        for _ in range(3):
            wait_until(lambda: is_parked(pool))
            pool.wake()
            wait_until(lambda: is_parked(pool))  # nothing came
            with pool.awake(), pool.awake():
                time.sleep(0.01)
                feed(pool.words.ctypes.data, np.array([number]), counter.ctypes.data, seen)
        assert counter[0] == 6


# --- beginning and end ---


def test_two_hundred_starts_and_stops_leave_no_thread() -> None:
    before = threading.active_count()
    for n in range(200):
        num_threads, caller_works = MODES[n % len(MODES)]
        with WorkerPool(num_threads, caller_works=caller_works) as pool:
            assert threading.active_count() == before + num_threads - caller_works
            if n % 3:
                CheckJob(pool).run()
        assert threading.active_count() == before


@modes
def test_close_lets_a_running_job_end(num_threads: int, caller_works: bool) -> None:
    pool = WorkerPool(num_threads, caller_works=caller_works)
    job = CheckJob(pool)
    job.start(5)
    pool.close()
    pool.close()
    job.check()
    with pytest.raises(AssertionError, match="closed"):
        job.start()


def test_close_lets_another_feeders_job_end() -> None:
    counter = np.zeros(1, np.int64)
    pool = WorkerPool(2, caller_works=False, spin_us=0)
    number = count_job(pool, counter, 3, 1)
    wait_until(lambda: is_parked(pool))
    pool.words[DOORBELL] = number
    pool.close()
    assert counter[0] == 6


@modes
def test_close_while_parked(num_threads: int, caller_works: bool) -> None:
    pool = WorkerPool(num_threads, caller_works=caller_works, spin_us=0)
    wait_until(lambda: is_parked(pool))
    pool.close()


def test_close_reports_a_failure_that_nobody_waited_for() -> None:
    pool = WorkerPool(2)
    job = CheckJob(pool)
    fail_worker(pool, OSError("gone"))
    job.start()
    with pytest.raises(OSError, match="gone"):
        pool.close()


def test_a_pool_that_is_dropped_ends_its_threads() -> None:
    before = threading.active_count()
    pool = WorkerPool(3, caller_works=True)
    pool.ring(CheckJob(pool).number)  # nobody works on it
    assert threading.active_count() == before + 2
    del pool
    gc.collect()
    assert threading.active_count() == before


def test_default_number_of_threads() -> None:
    cores = (1, 2, 3, 4, 6, 8, 16)
    assert [default_num_threads(n) for n in cores] == [1, 2, 3, 3, 5, 6, 14]
    here = num_cores(read_machine())
    with WorkerPool() as pool:
        assert pool.num_threads == default_num_threads(here)
        assert pool.caller_works == (pool.num_threads == here)
    with pytest.raises(ValueError, match="num_threads"):
        WorkerPool(0)

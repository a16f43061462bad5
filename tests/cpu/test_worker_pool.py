"""The worker pool: jobs run whole and in order, however they are rung, and tell of their errors."""

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
from pool_jobs import (
    HEADER_BYTES,
    MAX_PHASES,
    MODES,
    CheckJob,
    busy_neighbour,
    count_job,
    feed,
    modes,
)

from cpu_kernels.addresses import f32_array, i64_array
from cpu_kernels.compiled import stage_address
from cpu_kernels.intrinsics import atomic_store
from cpu_kernels.isa import host_isa
from cpu_kernels.threads import StageError, WorkerPool
from cpu_kernels.worker import DONE_BELL, DOORBELL, ERROR, JOB_HEADER, NUM_WORDS
from tests.workers import fail_worker, wait_until

# --- jobs ---


@modes
def test_phases_are_run_whole_and_in_order(num_threads: int, caller_works: bool) -> None:
    phases = np.random.default_rng(num_threads).integers(1, MAX_PHASES + 1, 1000)
    with WorkerPool(num_threads, caller_works=caller_works) as pool:
        jobs = [CheckJob(pool) for _ in range(3)]
        for n, num_phases in enumerate(phases):
            jobs[n % 3].run(int(num_phases))


@modes
def test_with_a_busy_neighbour(num_threads: int, caller_works: bool) -> None:
    with busy_neighbour(), WorkerPool(num_threads, caller_works=caller_works) as pool:
        job = CheckJob(pool)
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            job.run(3)


@pytest.mark.slow
def test_ten_thousand_jobs_with_a_busy_neighbour() -> None:
    with busy_neighbour(), WorkerPool() as pool:
        job = CheckJob(pool)
        for _ in range(10_000):
            job.run(3)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_feeder_without_python(num_threads: int) -> None:
    counter, rng = np.zeros(1, np.int64), np.random.default_rng(5)
    with WorkerPool(num_threads, caller_works=False) as pool, pool.awake():
        numbers = np.array([count_job(pool, counter, n + 1, 10**n) for n in (0, 1, 3)])
        chosen = rng.integers(0, 3, 500 if num_threads == 1 else 100)
        done = np.array([1, 2 * 10, 4 * 1000]) * num_threads
        seen = np.zeros(len(chosen), np.int64)
        feed(pool.words.ctypes.data, numbers[chosen], counter.ctypes.data, seen)
        assert np.array_equal(seen, np.cumsum(done[chosen]))  # each was whole when its bell rang
        assert pool.words[DOORBELL] == 0


def test_the_lower_half_of_the_bell_is_enough() -> None:
    counter = np.zeros(1, np.int64)
    with WorkerPool(2, caller_works=False) as pool, pool.awake():
        number = count_job(pool, counter, 1, 1)
        halves = pool.words.view(np.int32)
        halves[2 * DOORBELL] = number
        wait_until(lambda: bool(halves[2 * DONE_BELL] == number))
        assert counter[0] == 2


def test_words_may_lie_anywhere() -> None:
    words = np.full(NUM_WORDS + 3, 7, np.int64)
    with WorkerPool(2, words=words) as pool:
        assert pool.words is words
        CheckJob(pool).run()
    assert (words[NUM_WORDS:] == 7).all()
    for bad in (words[: NUM_WORDS - 1], words[::2], words.astype(np.int32)):
        with pytest.raises(ValueError, match="words"):
            WorkerPool(1, words=bad)


def test_job_numbers() -> None:
    with WorkerPool(1) as pool:
        jobs = [CheckJob(pool) for _ in range(3)]
        assert [job.number for job in jobs] == [1, 2, 3]
        pool.remove_job(2)
        with pytest.raises(AssertionError):
            pool.ring(2)
        again = CheckJob(pool)
        assert again.number == 2
        for job in (*jobs[::2], again):
            job.run()
        assert CheckJob(pool).number == 4
        with pytest.raises(AssertionError):
            pool.add_job(np.zeros(1, [("stage", "i8"), ("num_phases", "i4")]))
        with pytest.raises(AssertionError):
            pool.add_job(np.array([(0, 1)], JOB_HEADER))  # a stage is missing


# --- errors and float modes ---


@pytest.mark.parametrize("is_awake", [False, True])
@pytest.mark.parametrize(("num_threads", "caller_works"), MODES[1:])  # 1, True: no thread
def test_a_worker_whose_thread_fails(num_threads: int, caller_works: bool, is_awake: bool) -> None:
    """In the middle of a job, for which the others wait, or between two."""
    before = threading.active_count()
    pool = WorkerPool(num_threads, caller_works=caller_works)
    job = CheckJob(pool)
    job.run()
    with pool.awake() if is_awake else nullcontext():
        fail_worker(pool, MemoryError("no room"))
        with pytest.raises(MemoryError, match="no room"):
            job.run()
    with pytest.raises(MemoryError, match="no room"):
        job.start()
    pool.close()
    assert threading.active_count() == before


def make_complaining_stage() -> Callable[..., None]:
    def complaining_stage(job, phase, worker, num_workers):  # type: ignore[no-untyped-def]
        if worker == num_workers - 1:
            error = i64_array(job + HEADER_BYTES, 1)[0]
            atomic_store(i64_array(error, 1), 0, 42 + phase)

    return complaining_stage


@modes
def test_a_stages_error_code(num_threads: int, caller_works: bool) -> None:
    with WorkerPool(num_threads, caller_works=caller_works) as pool:
        assert pool.error_address == pool.words[ERROR:].ctypes.data
        job = (stage_address(make_complaining_stage), 2, pool.error_address)
        number = pool.add_job(np.array([job], [*JOB_HEADER, ("error", "i8")]))
        for _ in range(3):
            pool.ring(number)
            with pytest.raises(StageError) as caught:
                pool.wait()
            assert caught.value.code == 43
            CheckJob(pool).run()


def make_multiply_stage() -> Callable[..., None]:
    """factors[2 + worker] = factors[0] * factors[1]; the address of factors is in the job."""

    def multiply_stage(job, phase, worker, num_workers):  # type: ignore[no-untyped-def]
        factors = f32_array(i64_array(job + HEADER_BYTES, 1)[0], 2 + num_workers)
        factors[2 + worker] = factors[0] * factors[1]

    return multiply_stage


@pytest.mark.skipif(not host_isa().is_x86, reason="only x86 is slow with denormals")
@modes
def test_workers_flush_denormals_and_the_caller_does_not(
    num_threads: int, caller_works: bool
) -> None:
    factors = np.full(2 + num_threads, 1e-20, np.float32)
    with WorkerPool(num_threads, caller_works=caller_works) as pool:
        job = (stage_address(make_multiply_stage), 1, factors.ctypes.data)
        pool.ring(pool.add_job(np.array([job], [*JOB_HEADER, ("factors", "i8")])))
        pool.wait()
    assert (factors[2:] == 0).all()
    assert factors[0] * factors[1] > 0

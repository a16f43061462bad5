"""The worker pool: jobs run whole and in order, however they are rung; it parks, fails and ends."""

import dataclasses
import gc
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from pool_jobs import (
    HEADER_BYTES,
    MAX_PHASES,
    CheckJob,
    busy_neighbour,
    count_job,
    feed,
    python_job,
)

from cpu_kernels.addresses import f32_array, i64_array
from cpu_kernels.compiled import stage_address
from cpu_kernels.intrinsics import atomic_store
from cpu_kernels.isa import host_isa
from cpu_kernels.read_kernel import read
from cpu_kernels.threads import StageError, WorkerPool, default_num_threads
from cpu_kernels.topology import num_cores, read_machine
from cpu_kernels.worker import DONE_BELL, DOORBELL, ERROR, JOB_HEADER, NUM_WORDS, PARKED

MODES = [(1, True), (1, False), (2, True), (2, False), (3, True), (3, False)]
modes = pytest.mark.parametrize(("num_threads", "caller_works"), MODES)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def is_parked(pool: WorkerPool) -> bool:
    return int(pool.words[PARKED]) == pool.num_threads - pool.caller_works


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
            pool.add_job(np.array([(0, 1)], JOB_HEADER))  # a Python stage is missing


# --- Python phases ---


@modes
def test_python_phases_wait_for_each_other(num_threads: int, caller_works: bool) -> None:
    calls: list[tuple[int, int]] = []

    def stage(phase: int, worker: int, num_workers: int) -> None:
        assert num_workers == num_threads
        time.sleep(0.0003 * ((phase + worker) % 3))
        calls.append((phase, worker))

    with WorkerPool(num_threads, caller_works=caller_works) as pool:
        number, compiled = python_job(pool, 4, stage), CheckJob(pool)
        for _ in range(10):
            calls.clear()
            pool.ring(number)
            pool.wait()
            assert [phase for phase, _ in calls] == [
                p for p in range(4) for _ in range(num_threads)
            ]
            assert sorted(calls) == [(p, w) for p in range(4) for w in range(num_threads)]
            compiled.run()


@modes
@pytest.mark.parametrize("failing", [0, 2])
def test_an_exception_in_a_python_phase(num_threads: int, caller_works: bool, failing: int) -> None:
    def stage(phase: int, worker: int, num_workers: int) -> None:
        if phase == 1 and worker == min(failing, num_workers - 1):
            raise MemoryError("no room")

    before = threading.active_count()
    pool = WorkerPool(num_threads, caller_works=caller_works)
    number = python_job(pool, 3, stage)
    pool.ring(number)
    with pytest.raises(MemoryError, match="no room"):
        pool.wait()
    with pytest.raises(MemoryError, match="no room"):
        pool.ring(number)
    pool.close()
    assert threading.active_count() == before


# --- interrupts ---


def interrupt_once(pool: WorkerPool, name: str, *, after: bool) -> None:
    """Raise KeyboardInterrupt just before or after the next call of a compiled entry point."""
    crew = pool._crew
    kernels = crew.kernels

    def interrupted(*args: int) -> object:
        crew.kernels = kernels
        if after:
            getattr(kernels, name)(*args)
        raise KeyboardInterrupt

    crew.kernels = dataclasses.replace(kernels, **{name: interrupted})


@pytest.mark.parametrize("after", [False, True])
@modes
def test_a_wait_may_be_interrupted(num_threads: int, caller_works: bool, after: bool) -> None:
    with WorkerPool(num_threads, caller_works=caller_works) as pool:
        job = CheckJob(pool)
        for _ in range(3):
            interrupt_once(pool, "work_as_caller" if caller_works else "wait_while", after=after)
            with pytest.raises(KeyboardInterrupt):
                job.run()
            pool.wait()
            job.check()
            job.run()


@modes
def test_a_ring_may_be_interrupted_before_it_wakes_the_parked(
    num_threads: int, caller_works: bool
) -> None:
    with WorkerPool(num_threads, caller_works=caller_works, spin_us=0) as pool:
        job = CheckJob(pool)
        wait_until(lambda: is_parked(pool))
        interrupt_once(pool, "ring", after=True)
        with pytest.raises(KeyboardInterrupt):
            job.run()
        pool.wait()
        job.check()
        job.run()


def test_an_interrupt_within_a_phase_ends_the_pool() -> None:
    def stage(phase: int, worker: int, num_workers: int) -> None:
        if phase == 1 and worker == 0:
            raise KeyboardInterrupt

    before = threading.active_count()
    pool = WorkerPool(2, caller_works=True)
    number = python_job(pool, 3, stage)
    pool.ring(number)
    with pytest.raises(KeyboardInterrupt):
        pool.wait()
    with pytest.raises(KeyboardInterrupt):
        pool.ring(number)
    pool.close()
    assert threading.active_count() == before


# --- errors and float modes ---


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
    def stage(phase: int, worker: int, num_workers: int) -> None:
        raise OSError("gone")

    pool = WorkerPool(2)
    pool.ring(python_job(pool, 1, stage))
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


# --- a plain read ---


@pytest.mark.parametrize("num_words", [0, 1, 7, 2047, 2048, 2049, 100_003])
def test_a_plain_read_reads_every_word_once(num_words: int) -> None:
    arena = np.random.default_rng(num_words).integers(-(2**62), 2**62, num_words)
    with WorkerPool(3) as pool:
        for readers in (1, 2, 3):
            assert read(pool, arena, readers) == np.bitwise_xor.reduce(arena)


def test_a_plain_read_refuses_what_it_cannot_read() -> None:
    arena = np.zeros((8, 8), np.int64)
    with WorkerPool(2) as pool:
        for bad, readers in ((arena.T, 1), (np.zeros(3, np.uint16), 1), (arena, 0), (arena, 3)):
            with pytest.raises(ValueError):
                read(pool, bad, readers)

"""Ctrl-C while a pool rings, waits or works."""

import dataclasses

import pytest
from pool_jobs import CheckJob, modes

from cpu_kernels.threads import WorkerPool
from tests.workers import is_parked, wait_until


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

"""Threads of the expert pool: they start, park, fail loudly and end."""

import dataclasses
import os
import threading
import time

import numpy as np
import pytest
from expert_layers import Layer, random_layer, relative_error, run_layer

from cpu_kernels.compiled import kernels
from cpu_kernels.expert_kernels import JOB
from cpu_kernels.expert_mlp import ExpertPool
from cpu_kernels.threads import WorkerPool, cores_of_quota, default_num_threads, num_physical_cores


def small_layer() -> Layer:
    return random_layer(
        np.random.default_rng(7),
        num_experts=3,
        hidden=32,
        width=16,
        num_tokens=4,
        num_pairs=8,
        dtype="bf16",
    )


def test_fifty_starts_and_stops_leave_no_thread() -> None:
    before = threading.active_count()
    layer = small_layer()
    for _ in range(50):
        with ExpertPool(3) as pool:
            assert threading.active_count() == before + 3
            assert relative_error(run_layer(pool, layer), layer) < 1e-5
        assert threading.active_count() == before


def test_close_waits_for_the_layer_and_may_be_repeated() -> None:
    layer = small_layer()
    pool = ExpertPool(2)
    expected_TH = run_layer(pool, layer)
    out_TH = np.empty_like(layer.x_TH)
    pool.submit(*layer.arrays(), out_TH)
    pool.close()
    pool.close()
    assert np.array_equal(out_TH, expected_TH)
    with pytest.raises(AssertionError, match="closed"):
        pool.submit(*layer.arrays(), out_TH)


def test_a_pool_that_is_dropped_ends_its_threads() -> None:
    before = threading.active_count()
    pool = ExpertPool(2)
    assert threading.active_count() == before + 2
    del pool
    assert threading.active_count() == before


def test_submit_waits_for_the_layer_before() -> None:
    layer = small_layer()
    with ExpertPool(2) as pool:
        expected_TH = run_layer(pool, layer)
        outs = [np.empty_like(layer.x_TH) for _ in range(20)]
        for out_TH in outs:
            pool.submit(*layer.arrays(), out_TH)
        pool.wait()
        pool.wait()
    assert all(np.array_equal(out_TH, expected_TH) for out_TH in outs)


def test_idle_workers_park_and_wake() -> None:
    layer = small_layer()
    with ExpertPool(2) as pool:
        expected_TH = run_layer(pool, layer)
        time.sleep(0.05)  # spinning lasts 2 ms at most
        busy = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - busy < 0.05
        assert np.array_equal(run_layer(pool, layer), expected_TH)


@pytest.mark.parametrize("failing", [0, 2])
def test_a_workers_exception_reaches_the_caller(failing: int) -> None:
    real = kernels()

    def broken_loop(words, jobs, seen, worker, *rest):  # type: ignore[no-untyped-def]
        result = real.worker_loop(words, jobs, seen, worker, *rest)
        if worker == failing:
            raise MemoryError("no room")
        return result

    before = threading.active_count()
    broken = dataclasses.replace(real, worker_loop=broken_loop)
    pool = WorkerPool(broken, np.zeros(1, JOB), 3)
    with pytest.raises(MemoryError, match="no room"):
        for _ in range(1000):
            pool.start()
            pool.wait()
            time.sleep(0.001)
    with pytest.raises(MemoryError, match="no room"):
        pool.close()
    assert threading.active_count() == before


def test_default_number_of_threads() -> None:
    assert [default_num_threads(cores) for cores in (1, 2, 3, 4, 6, 8, 16)] == [
        1,
        2,
        3,
        3,
        5,
        6,
        14,
    ]
    assert 1 <= num_physical_cores() <= (os.cpu_count() or 1)
    with ExpertPool() as pool:
        assert pool.num_threads == default_num_threads(num_physical_cores())
    with pytest.raises(ValueError, match="num_threads"):
        ExpertPool(0)


@pytest.mark.parametrize("num_words", [0, 1, 7, 2047, 2048, 2049, 100_003])
def test_a_plain_read_reads_every_word_once(num_words: int) -> None:
    arena = np.random.default_rng(num_words).integers(-(2**62), 2**62, num_words)
    layer = small_layer()
    with ExpertPool(3) as pool:
        for readers in (1, 2, 3):
            assert pool.read(arena, readers) == np.bitwise_xor.reduce(arena)
            assert relative_error(run_layer(pool, layer), layer) < 1e-5  # layers go on after it


def test_a_plain_read_refuses_what_it_cannot_read() -> None:
    arena = np.zeros((8, 8), np.int64)
    with ExpertPool(2) as pool:
        for bad, readers in ((arena.T, 1), (np.zeros(3, np.uint16), 1), (arena, 0), (arena, 3)):
            with pytest.raises(ValueError):
                pool.read(bad, readers)


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("max 100000\n", None), ("250000 100000\n", 2), ("50000 100000\n", 1)],
)
def test_a_containers_quota_counts(cpu_max: str, cores: int | None) -> None:
    assert cores_of_quota(cpu_max) == cores

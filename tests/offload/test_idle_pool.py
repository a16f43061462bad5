"""A pool that answers what is rung, and what feeds it."""

import numpy as np
import pytest

from cpu_kernels.worker import DONE_BELL, DOORBELL, NUM_WORDS
from offload.handoff import HostBell, await_stream
from offload.idle_pool import IdlePool
from tests.offload.test_handoff import Stream


@pytest.fixture
def pool() -> IdlePool:
    return IdlePool(np.zeros(NUM_WORDS, dtype=np.int64))


def test_a_stream_that_feeds_it_runs_to_its_end(pool: IdlePool) -> None:
    numbers = [pool.add_layer(None).number for _ in range(3)]
    assert len(set(numbers)) == 3 and 0 not in numbers
    bell = HostBell(pool.workers.words)
    work = [lambda n=n, do=do: do(n) for n in numbers * 20 for do in (bell.ring, bell.wait)]
    stream = Stream(*work)
    with pool.workers.awake():
        await_stream(stream.is_done, stream.is_done, pool.workers.words, numbers)
    assert pool.workers.words[DOORBELL] == 0
    assert pool.workers.words[DONE_BELL] == numbers[-1]


def test_nobody_answers_outside(pool: IdlePool) -> None:
    with pool.workers.awake():
        pass
    HostBell(pool.workers.words).ring(1)
    assert pool.workers.words[DOORBELL] == 1 and pool.workers.words[DONE_BELL] == 0

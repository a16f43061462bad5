"""The hand-off's protocol with real workers, where a Python thread plays the GPU's stream."""

import _thread
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import DOORBELL
from fiddler.errors import WorkerError
from offload.handoff import EagerHandOff, HostBell, await_stream
from tests.workers import add_python_job, fail_worker


class Stream:
    """Does what is put on it, in order, on a thread of its own."""

    def __init__(self, *work: Callable[[], object]) -> None:
        self._thread = threading.Thread(target=lambda: [do() for do in work], daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        return not self._thread.is_alive()


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2, caller_works=False) as workers:
        yield workers


def add_job(pool: WorkerPool, work: Callable[[], object]) -> int:
    """One of a single phase, in which worker 0 does ``work``."""
    return add_python_job(pool, lambda phase, worker, num_workers: worker == 0 and work())


def feed(pool: WorkerPool, numbers: list[int], patience_s: float = 20.0) -> None:
    """A stream that rings and awaits each job in turn, and a host that watches it."""
    bell = HostBell(pool.words)
    work = [lambda n=n, do=do: do(n) for n in numbers for do in (bell.ring, bell.wait)]
    with pool.awake():
        stream = Stream(*work)
        await_stream(stream.is_done, stream.is_done, pool.words, numbers, patience_s)


def test_jobs_run_in_the_order_of_the_stream(pool: WorkerPool) -> None:
    seen: list[str] = []
    numbers = [add_job(pool, lambda n=n: seen.append(n)) for n in "abc"]
    for _ in range(20):
        feed(pool, numbers)
    assert "".join(seen) == "abc" * 20
    pool.ring(numbers[1])  # and Python may ring again
    pool.wait()
    assert seen[-1] == "b"


def test_the_eager_way_waits_for_the_stream_first(pool: WorkerPool) -> None:
    seen: list[str] = []
    number = add_job(pool, lambda: seen.append("job"))
    hand_off = EagerHandOff(pool, lambda: seen.append("stream"))
    hand_off.ring(number)
    hand_off.wait(number)
    assert seen == ["stream", "job"]


def test_a_worker_that_fails_does_not_hold_the_stream() -> None:
    pool = WorkerPool(2, caller_works=False)
    numbers = [add_job(pool, lambda: None) for _ in range(2)]
    feed(pool, numbers)
    fail_worker(pool, MemoryError("no room"))
    with pytest.raises(WorkerError, match="a CPU worker failed"):
        feed(pool, [*numbers, *numbers])
    with pytest.raises(MemoryError, match="no room"):
        pool.wait()
    pool.close()


@pytest.mark.parametrize("comes_back", [False, True])
def test_workers_that_stand_still_do_not_hold_the_stream(comes_back: bool) -> None:
    """Even if they wake later, clear the bell and say that a job long gone is done."""
    pool = WorkerPool(2, caller_works=False)
    may_go = threading.Event()
    stuck = add_job(pool, lambda: may_go.wait(60))
    later = [add_job(pool, lambda: time.sleep(0.01)) for _ in range(3)]
    bell = HostBell(pool.words)
    stream = Stream(
        lambda: bell.ring(stuck),
        lambda: bell.wait(stuck),  # which is over when the host has helped the stream past it
        may_go.set if comes_back else lambda: None,
        *(lambda n=n, do=do: do(n) for n in later for do in (bell.ring, bell.wait)),
    )
    with pool.awake(), pytest.raises(WorkerError, match=r"stood still for 0.1 seconds"):
        await_stream(stream.is_done, stream.is_done, pool.words, [stuck, *later], patience_s=0.1)
    assert may_go.is_set() == comes_back
    may_go.set()
    pool.words[DOORBELL] = 0  # what the stream left
    pool.close()


def test_a_step_is_awaited_without_the_one_behind_it(pool: WorkerPool) -> None:
    may_end = threading.Event()
    numbers = [add_job(pool, lambda: None), add_job(pool, lambda: may_end.wait(60))]
    bell, seen = HostBell(pool.words), list[int]()
    work = [lambda n=n, do=do: do(n) for n in numbers for do in (bell.ring, bell.wait)]
    work.insert(2, lambda: seen.append(1))
    stream = Stream(*work)
    with pool.awake():
        await_stream(lambda: bool(seen), stream.is_done, pool.words, numbers)
    assert not stream.is_done()
    may_end.set()
    with pool.awake():
        await_stream(stream.is_done, stream.is_done, pool.words, numbers)


def test_a_failure_of_the_step_behind_is_told_when_that_is_awaited() -> None:
    pool = WorkerPool(2, caller_works=False)
    numbers = [add_job(pool, lambda: None) for _ in range(2)]
    bell, is_awaited = HostBell(pool.words), threading.Event()
    seen: list[int] = []
    stream = Stream(
        lambda: bell.ring(numbers[0]),
        lambda: bell.wait(numbers[0]),
        lambda: seen.append(1),
        lambda: is_awaited.wait(60),
        lambda: fail_worker(pool, MemoryError("no room")),
        lambda: bell.ring(numbers[1]),
        lambda: bell.wait(numbers[1]),
    )
    with pool.awake():
        await_stream(lambda: bool(seen), stream.is_done, pool.words, numbers)
        is_awaited.set()
        with pytest.raises(WorkerError, match="a CPU worker failed"):
            await_stream(stream.is_done, stream.is_done, pool.words, numbers)
    assert stream.is_done()
    with pytest.raises(MemoryError, match="no room"):
        pool.wait()
    pool.close()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_stream(pool: WorkerPool) -> None:
    """The workers that it needs would park."""
    bell, is_awaited = HostBell(pool.words), threading.Event()
    seen: list[str] = []
    number = add_job(pool, lambda: time.sleep(0.05))
    stream = Stream(
        is_awaited.wait,
        _thread.interrupt_main,
        lambda: bell.ring(number),
        lambda: bell.wait(number),
        lambda: seen.append("end"),
    )

    def is_done() -> bool:
        is_awaited.set()
        return stream.is_done()

    with pytest.raises(KeyboardInterrupt), pool.awake():
        await_stream(is_done, is_done, pool.words, [number])
    assert seen == ["end"]

"""Threads that read weights side by side."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


def reader_threads(num_threads: int) -> ThreadPoolExecutor:
    """They run already, and torch uses one thread in each: 16 with 16 of torch's only fight.

    torch gives the last number that any thread has set to threads that come later: so the caller
    sets its own once more.
    """
    before = torch.get_num_threads()
    meeting = threading.Barrier(num_threads)

    def meet(_: int) -> None:
        meeting.wait()

    threads = ThreadPoolExecutor(num_threads, "fiddler-load", initializer=_use_one_thread)
    try:
        list(threads.map(meet, range(num_threads)))
    except BaseException:  # a thread that cannot be started: the others would wait for it forever
        meeting.abort()
        threads.shutdown()
        raise
    finally:
        torch.set_num_threads(before)
    return threads


def _use_one_thread() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # else torch would set its own number when this thread first works

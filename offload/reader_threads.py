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

    threads = ThreadPoolExecutor(
        num_threads, "fiddler-load", initializer=lambda: torch.set_num_threads(1)
    )
    list(threads.map(meet, range(num_threads)))
    torch.set_num_threads(before)
    return threads

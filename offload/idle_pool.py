"""A pool that answers every job at once and computes none: a stream that feeds it runs to its end.

With it the GPU's kernels of a decode step can be run, and so compiled, before those of the CPU's
experts are.

Ordering: the protocol of :mod:`cpu_kernels.worker`, whose worker 0 this is: DOORBELL is cleared,
then DONE_BELL stored, each by a store with a full fence. Nothing but words is read or written.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiled import kernels
from cpu_kernels.worker import DONE_BELL, DOORBELL

LOOK_S = 20e-6


class IdleWorkers:
    """The feeder's side of :class:`cpu_kernels.threads.WorkerPool`, by one thread of Python."""

    def __init__(self, words: npt.NDArray[np.int64]) -> None:
        """``words`` as that class takes them."""
        self.words, self._kernels = words, kernels()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Within, whatever is rung is done."""
        ended = threading.Event()
        answering = threading.Thread(target=self._answer, args=(ended,), daemon=True)
        answering.start()
        try:
            yield
        finally:
            ended.set()
            answering.join()

    def ring(self, number: int) -> None:
        """Start job ``number``, which is to do nothing."""

    def wait(self) -> None:
        """Return when it is done."""

    def _answer(self, ended: threading.Event) -> None:
        words = self.words
        while not ended.is_set():
            if number := int(words[DOORBELL]):
                # in this order: the next ring may follow the answer at once
                for index, value in ((DOORBELL, 0), (DONE_BELL, number)):
                    self._kernels.announce(words.ctypes.data, index, value, index)
            else:
                time.sleep(LOOK_S)


class IdlePool:
    """An :class:`offload.worker_pool.WorkerPool` whose layers give whatever their output held."""

    def __init__(self, words: npt.NDArray[np.int64]) -> None:
        self.workers = IdleWorkers(words)
        self._numbers = itertools.count(1)

    def add_layer(self, experts: object, **options: object) -> Any:
        """A layer that has a number and nothing else."""
        return SimpleNamespace(number=next(self._numbers))

    def remove_layer(self, layer: object) -> None:
        """Nothing was kept."""

    def bind(self, layer: object, *arrays: object) -> None:
        """Nothing will be read."""

    def submit(self, layer: object, *arrays: object) -> None:
        """Nothing is computed."""

    def wait(self) -> None:
        """It is done."""

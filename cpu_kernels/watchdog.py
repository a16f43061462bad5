"""Notices workers that stand still in a job, by the words that change when one of them gets on."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.worker import DONE_BELL, DOORBELL, GENERATION, LINE, TAKEN

# Nothing shows within a piece of work. A layer of 32 tokens takes 0.2 s where memory is slow; who
# rings a job with longer pieces says so (:meth:`cpu_kernels.threads.WorkerPool.ring`).
PATIENCE_S = 20.0
# What counts of the time between two looks: a process that was stopped, as by Ctrl-Z, has not
# looked for minutes, and its workers have not stood still but for the same reason.
MOST_S = 1.0
SIGNS = (DOORBELL, DONE_BELL, GENERATION, TAKEN, TAKEN + LINE)


class StandstillError(RuntimeError):
    """The workers did not get on with a job, and the pool was given up."""


class Watchdog:
    """Looks at a pool's words now and then, more than once a second. One per stream's run or job.

    Ordering: words are read one by one, without order: "something has changed" is all that counts.
    """

    def __init__(
        self,
        words: npt.NDArray[np.int64],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._words, self._patience_s, self._clock = words, patience_s, clock
        self._seen: tuple[Any, ...] = ()
        self._looked = self._still_s = 0.0

    def complaint(self) -> str:
        """What is wrong, or nothing. Only a pool with a job can stand still."""
        words, now = self._words, self._clock()
        seen = tuple([words[sign] for sign in SIGNS])
        if words[DOORBELL] == 0 or seen != self._seen:
            self._seen, self._still_s = seen, 0.0
        else:
            self._still_s += min(now - self._looked, MOST_S)
        self._looked = now
        if self._still_s < self._patience_s:
            return ""
        return f"the CPU workers stood still for {round(self._patience_s, 1):g} seconds"

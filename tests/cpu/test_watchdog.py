"""Whether workers stand still, told from words and a clock."""

import numpy as np

from cpu_kernels.watchdog import Watchdog
from cpu_kernels.worker import DONE_BELL, DOORBELL, GENERATION, LINE, NUM_WORDS, TAKEN


class Watched:
    """Words of a pool, looked at twice a second by a clock of their own."""

    def __init__(self) -> None:
        self.words = np.zeros(NUM_WORDS, np.int64)
        self.now = 100.0
        self._watchdog = Watchdog(self.words, 10.0, clock=lambda: self.now)

    def after(self, seconds: float) -> str:
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            complaint = self._watchdog.complaint()
        return complaint


def test_it_counts_from_the_last_sign_of_life() -> None:
    watched = Watched()
    words = watched.words
    assert watched.after(1000) == ""  # nothing is rung: the GPU may take its time
    words[DOORBELL] = 3
    assert watched.after(9) == ""
    for sign in (GENERATION, TAKEN, TAKEN + LINE):  # a phase is done, or a piece is begun
        words[sign] += 1
        assert watched.after(10) == ""
    assert watched.after(0.5) == "the CPU workers stood still for 10 seconds"
    words[DOORBELL], words[DONE_BELL] = 0, 3
    assert watched.after(1000) == ""


def test_a_process_that_was_stopped_has_not_stood_still() -> None:
    watched = Watched()
    watched.words[DOORBELL] = 1
    assert watched.after(8) == ""
    watched.now += 3600
    assert watched.after(1) == ""
    assert "stood still" in watched.after(1)

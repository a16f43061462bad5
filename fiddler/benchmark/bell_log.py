"""When CPU workers began and ended their jobs, seen from outside: by looking at their words.

Ordering: a thread of its own only reads the pool's words, each of 8 bytes at once; words of one
look may be some 100 ns apart, so an order within that is chance. It naps between two looks and
takes Python's lock for some microseconds at each; an event is dated to the middle between the last
look that did not see it and the first that did. A job that begins and ends between two looks is
missed.
"""

import contextlib
import ctypes
import statistics
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from cpu_kernels.worker import ARRIVED, DOORBELL, GENERATION, LINE
from fiddler.benchmark.timeline import Span

PROCESS = "CPU workers"
NAP_S = 10e-6
LOCK_S = 50e-6  # how long another thread may keep Python's lock from a look; else 5 ms
TIMER_SLACK = 29  # of prctl; naps of 10 us take 60 us as Linux rounds them up by itself


@dataclass(frozen=True, slots=True)
class Look:
    """What a look found that differs from the look before, which began at ``before_ns``.

    It came to be so between then and ``at_ns``, when this look was over.

    ``arrived``: the generation that each worker but the first waits for; see the words.
    """

    before_ns: int
    at_ns: int
    job: int
    generation: int
    arrived: tuple[int, ...] = ()

    @property
    def changed_ns(self) -> int:
        """When it came to be so, as well as can be told."""
        return (self.before_ns + self.at_ns) // 2


class BellLog:
    """Looks at the words of a pool of ``num_workers`` within its context."""

    def __init__(self, words: npt.NDArray[np.int64], num_workers: int) -> None:
        self._words = words
        arrived = [ARRIVED + LINE * worker for worker in range(1, num_workers)]
        self._places = np.array([DOORBELL, GENERATION, *arrived])
        self._must_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bell-log", daemon=True)
        self.looks: list[Look] = []
        self._gaps_ns: list[int] = []

    @property
    def gap_us(self) -> float:
        """The median time between two looks."""
        return statistics.median(self._gaps_ns) / 1e3 if self._gaps_ns else 0.0

    def __enter__(self) -> Self:
        self._lock_s = sys.getswitchinterval()
        sys.setswitchinterval(LOCK_S)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._must_stop.set()
        self._thread.join()
        sys.setswitchinterval(self._lock_s)

    def _run(self) -> None:
        _nap_exactly()
        seen, before_ns = b"", time.perf_counter_ns()
        while not self._must_stop.is_set():
            began_ns = time.perf_counter_ns()
            found = self._words[self._places]
            if found.tobytes() != seen:
                now_ns, seen = time.perf_counter_ns(), found.tobytes()
                job, generation, *arrived = found.tolist()
                self.looks.append(Look(before_ns, now_ns, job, generation, tuple(arrived)))
            self._gaps_ns.append(began_ns - before_ns)
            before_ns = began_ns
            time.sleep(NAP_S)


@dataclass(slots=True)
class _Job:
    """A job under way; ``phase`` counts from 1. ``busy`` are the workers that have not arrived."""

    name: str
    begin_ns: int
    num_workers: int
    phase: int = 1
    phase_begin_ns: int = 0
    busy: set[int] = field(default_factory=set)

    def start_phase(self, phase: int, at_ns: int) -> None:
        self.phase, self.phase_begin_ns = phase, at_ns
        self.busy = set(range(self.num_workers))

    def share(self, worker: int, end_ns: int) -> Span:
        """A worker's share of the phase."""
        self.busy.discard(worker)
        return self._span(f"worker {worker}", self.phase_begin_ns, end_ns)

    def end_phase(self, end_ns: int) -> list[Span]:
        """The phase and the shares that go on to its end: worker 0 waits there for the others."""
        shares = [self.share(worker, end_ns) for worker in sorted(self.busy)]
        return [self._span("jobs", self.phase_begin_ns, end_ns), *shares]

    def end(self, end_ns: int) -> list[Span]:
        """All of it."""
        whole = Span(
            process=PROCESS, thread="jobs", name=self.name, begin_ns=self.begin_ns, end_ns=end_ns
        )
        return [whole, *self.end_phase(end_ns)]

    def _span(self, thread: str, begin_ns: int, end_ns: int) -> Span:
        return Span(
            process=PROCESS,
            thread=thread,
            name=f"phase {self.phase}",
            begin_ns=begin_ns,
            end_ns=end_ns,
            args={"job": self.name},
        )


def job_spans(looks: Sequence[Look], names: Mapping[int, str]) -> list[Span]:
    """Jobs with their phases in one row, and in a row of each worker its shares of the phases.

    ``names`` of jobs by number. A job that goes on at the last look is left out.
    """
    spans: list[Span] = []
    job: _Job | None = None
    for before, now in pairwise(looks):
        at_ns = now.changed_ns
        if job is not None and now.job != before.job:
            spans += job.end(at_ns)
            job = None
        elif job is not None and now.generation != before.generation:
            spans += job.end_phase(at_ns)
            job.start_phase(job.phase + now.generation - before.generation, at_ns)
        if job is not None:
            waiting = [w for w, at in enumerate(now.arrived, start=1) if at > now.generation]
            spans += [job.share(worker, at_ns) for worker in waiting if worker in job.busy]
        if job is None and now.job not in (0, before.job):
            name = names.get(now.job, f"job {now.job}")
            job = _Job(name, at_ns, 1 + len(now.arrived))
            job.start_phase(1, at_ns)
    return sorted(spans, key=_order)


def _order(span: Span) -> tuple[bool, int, str, int, int]:
    """By rows, jobs first, then worker 0, 1, ...; what holds others before them."""
    row = span.thread != "jobs", len(span.thread), span.thread
    return (*row, span.begin_ns, -span.end_ns)


def _nap_exactly() -> None:
    """Let this thread's naps take as long as they should, where the system can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(TIMER_SLACK, *map(ctypes.c_ulong, (1, 0, 0, 0)))

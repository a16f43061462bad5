"""Which way a GPU stream and the CPU workers can hand work to each other here: tried, not guessed.

Four ways, the fastest first (per hand-off on one H200 with PCIe 5): kernels that store and wait
(``kernel``), stream stores and waits (``values``, 5.8 us), host functions (``hostfunc``, 30 us),
and Python between two launches (``eager``), which no CUDA graph can hold.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Literal

import torch

from fiddler.errors import ConfigError
from gpu_kernels.host_words import Bell
from offload.cuda_driver import DriverError, HostCallback, cuda_driver, current_stream

Way = Literal["kernel", "values", "hostfunc", "eager"]
WAYS: tuple[Way, ...] = ("kernel", "values", "hostfunc", "eager")
VARIABLE = "FIDDLER_HANDOFF"
TIME_LIMIT = "this GPU ends kernels that take long, as one with a display may"
PATIENCE_S = 5.0  # a stream of three small operations takes microseconds


@dataclass(frozen=True, slots=True)
class Probe:
    """What works; ``problems`` says why a way does not, by its name."""

    works: tuple[Way, ...]
    problems: dict[str, str]

    @property
    def best(self) -> Way:
        """The fastest way that works."""
        return self.works[0]


def choose_way(probe: Probe, forced: str | None) -> Way:
    """The way to go: the ``forced`` one, or the fastest.

    Raises ConfigError for a way that is unknown or does not work here.
    """
    if not forced:
        return probe.best
    for way in WAYS:
        if way == forced and way in probe.works:
            return way
    if forced in WAYS:
        raise ConfigError(
            f"{VARIABLE}={forced} does not work here: {probe.problems[forced]}",
            hint=f"unset {VARIABLE} to use {probe.best}",
        )
    raise ConfigError(
        f"{VARIABLE} must be one of {', '.join(WAYS)}, not {forced!r}", hint=f"unset {VARIABLE}"
    )


def forced_way() -> str | None:
    """What the environment asks for."""
    return os.environ.get(VARIABLE) or None


@functools.cache
def probe() -> Probe:
    """Try every way once on the current CUDA device."""
    tries: dict[Way, Callable[[], None]] = {
        "kernel": _try_kernels,
        "values": _try_values,
        "hostfunc": _try_host_function,
    }
    works: list[Way] = []
    problems: dict[str, str] = {}
    for way, attempt in tries.items():
        try:
            attempt()
            works.append(way)
        except (DriverError, OSError, RuntimeError, ImportError, SubprocessError) as error:
            problems[way] = str(error)
    return Probe((*works, "eager"), problems)


def _try_kernels() -> None:
    """A kernel waits for a word that the host stores late, then rings."""
    _require(
        not cuda_driver().limits_kernels(torch.cuda.current_device()),
        TIME_LIMIT,
    )
    from gpu_kernels.bell import answer  # brings Triton in

    def work(awaited: torch.Tensor, stored: torch.Tensor) -> None:
        answer(Bell(awaited, 5), Bell(stored, 9))

    _try_words(work)


def _try_values() -> None:
    """The stream waits for a word that the host stores late, then stores one itself."""
    driver = cuda_driver()

    def work(awaited: torch.Tensor, stored: torch.Tensor) -> None:
        stream = current_stream()
        driver.wait_word(stream, driver.device_address(awaited.data_ptr()), 5)
        driver.write_word(stream, driver.device_address(stored.data_ptr()), 9)

    _try_words(work)


def _try_words(work: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """``work`` puts on a stream: a wait until the first word is 5, then a 9 in the second."""
    words = torch.zeros(32, dtype=torch.int64, pin_memory=True)
    awaited, stored = words[:1], words[16:17]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    try:
        with torch.cuda.stream(stream):
            work(awaited, stored)
        ended = stream.record_event()
        _require(not ended.query() and stored.item() == 0, "a stream did not wait for its word")
    finally:
        awaited.fill_(5)  # whatever happened, the stream must come to its end
    _wait_for(ended, "a stream did not see the word that it waited for")
    _require(stored.item() == 9, "the host did not see what a stream stored")


def _try_host_function() -> None:
    seen: list[int] = []
    callback = HostCallback(seen.append)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    cuda_driver().call_host(int(stream.cuda_stream), callback, 7)
    _wait_for(stream.record_event(), "a host function did not end")
    _require(seen == [7], "a host function was not called")


def _wait_for(event: torch.cuda.Event, complaint: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not event.query():  # type: ignore[no-untyped-call]
        _require(time.monotonic() < deadline, complaint)
        time.sleep(1e-4)


def _require(holds: bool, complaint: str) -> None:
    if not holds:
        raise RuntimeError(complaint)

"""Compiles entry points and stages; later starts find them in Numba's file cache.

Numba's cache looks only at the file that defines a function, so an edited callee elsewhere would
stay stale. Names of all that is compiled here end in a hash of this folder's sources, and the name
is part of the cache's key. What a function closes over (numbers, strings) is another part of it.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
from numba import types

from cpu_kernels import addresses, worker
from cpu_kernels.amx import may_use_tiles

FOLDER = Path(__file__).parent

_INT = types.int64
_STAGE = types.void(_INT, _INT, _INT, _INT)  # job address, phase, worker, number of workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The compiled entry points; all of them run without the GIL.

    Those that take ``words`` want the address of the pool's words: an array costs a call from
    Python 0.3 us more. :mod:`cpu_kernels.worker` says what they do.
    """

    worker_loop: Callable[[int, int, int, int], int]
    work_as_caller: Callable[[int, int, int, int], None]
    ring: Callable[[int, int], int]
    wait_while: Callable[[int, int, int, int], int]
    announce: Callable[[int, int, int, int], int]


def _entry_points() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions and signatures."""
    num_words, num_jobs = worker.NUM_WORDS, worker.MAX_JOBS

    def worker_loop(words, table, index, num_workers):
        shared = addresses.i64_array(words, num_words)
        jobs = addresses.i64_array(table, num_jobs)
        return worker.worker_loop(shared, jobs, index, num_workers)

    def work_as_caller(words, table, number, num_workers):
        shared = addresses.i64_array(words, num_words)
        jobs = addresses.i64_array(table, num_jobs)
        worker.work_as_caller(shared, jobs, number, num_workers)

    def ring(words, number):
        return worker.ring(addresses.i64_array(words, num_words), number)

    def wait_while(words, index, value, most):
        shared = addresses.i64_array(words, num_words)
        return worker.wait_while(shared, index, value, most)

    def announce(words, index, value, other):
        return worker.announce(addresses.i64_array(words, num_words), index, value, other)

    return {
        "worker_loop": (worker_loop, (_INT,) * 4),
        "work_as_caller": (work_as_caller, (_INT,) * 4),
        "ring": (ring, (_INT, _INT)),
        "wait_while": (wait_while, (_INT,) * 4),
        "announce": (announce, (_INT,) * 4),
    }


@functools.cache
def source_hash() -> str:
    """A hash of all sources of this folder."""
    sources = (path.read_bytes() for path in sorted(FOLDER.glob("*.py")))
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def stamped(function: Callable[..., Any], *key: int | str) -> Callable[..., Any]:
    """The function, named so that Numba's cache finds it for these sources and this key only.

    And for this process: one that may not use AMX's tiles must not load code that does.
    """
    parts = [function.__qualname__, source_hash(), *map(str, key)]
    function.__qualname__ = ".".join([*parts, "tiles"] if may_use_tiles() else parts)
    return function


def compile_entry(function: Callable[..., Any], signature: tuple[Any, ...]) -> Any:
    """Compile for one signature, or load from the cache; without a cache where that fails."""

    def compiled(*, cache: bool) -> Any:
        dispatcher = numba.njit(nogil=True, cache=cache)(function)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return _with_cache(compiled)


def compile_stage(function: Callable[..., Any]) -> Any:
    """As :func:`compile_entry`, for a stage of a job: a C function, which must not raise."""

    def compiled(*, cache: bool) -> Any:
        return numba.cfunc(_STAGE, cache=cache, error_model="numpy")(function)

    return _with_cache(compiled)


def _with_cache(compiled: Callable[..., Any]) -> Any:
    """A cache fails where no folder can be written or its files are damaged, in many ways.

    An error in the code itself is raised by the second attempt.
    """
    try:
        return compiled(cache=True)
    except Exception:
        return compiled(cache=False)


@functools.cache
def entry(make: Callable[[], Callable[..., Any]], signature: tuple[Any, ...]) -> Any:
    """The function that ``make()`` returns, compiled for one signature; once per process."""
    return compile_entry(stamped(make()), signature)


@functools.cache
def _stage(make: Callable[..., Callable[..., None]], *key: int | str) -> Any:
    return compile_stage(stamped(make(*key), *key))


def stage_address(make: Callable[..., Callable[..., None]], *key: int | str) -> int:
    """The address of the stage ``make(*key)``, for a job's header; compiled once per process.

    ``make`` is a module's function that returns a stage: (job address, phase, worker, number of
    workers), which may close over numbers and strings. A stage must not raise: Numba would print
    the exception and go on.
    """
    return int(_stage(make, *key).address)


@functools.cache
def kernels() -> Kernels:
    """The compiled kernels; the first call on a machine compiles them: :func:`needs_compile`."""
    entries = _entry_points().items()
    return Kernels(**{name: compile_entry(stamped(f), types) for name, (f, types) in entries})


def needs_compile() -> bool:
    """Whether :func:`kernels` will have to compile, which takes some ten seconds.

    An estimate: a cache that another make of CPU has written counts as a cache.
    """
    is_ready = kernels.cache_info().currsize > 0
    return not is_ready and not _is_cached(stamped(_entry_points()["worker_loop"][0]))


def stage_needs_compile(make: Callable[..., Callable[..., None]], *key: int | str) -> bool:
    """As :func:`needs_compile`, for :func:`stage_address` with the same arguments."""
    return not _is_cached(stamped(make(*key), *key))


def entry_needs_compile(make: Callable[[], Callable[..., Any]]) -> bool:
    """As :func:`needs_compile`, for :func:`entry`."""
    return not _is_cached(stamped(make()))


def cache_folder(function: Callable[..., Any]) -> Path | None:
    """Where Numba keeps what is compiled of the function's file; None: nowhere."""
    try:
        return Path(str(numba.njit(cache=True)(function).stats.cache_path))
    except RuntimeError:  # no folder for a cache can be written
        return None


def _is_cached(function: Callable[..., Any]) -> bool:
    """Whether a stamped function has a file in Numba's cache."""
    folder = cache_folder(function)
    name = function.__qualname__.rpartition("<locals>.")[2]
    return folder is not None and any(folder.glob(f"*.{name}-*.nbc"))

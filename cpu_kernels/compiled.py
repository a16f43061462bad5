"""Compiles the kernels' entry points; later starts find them in Numba's file cache.

Numba's cache looks only at the file that defines a function, so an edited callee elsewhere would
stay stale. The entry points close over a hash of this package's sources, which is part of the key.
"""

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from cpu_kernels import (
    dot_tile,
    expert_kernels,
    intrinsics,
    isa,
    read_kernel,
    sort_pairs,
    worker,
)

DTYPES = (np.dtype(np.uint16), np.dtype(np.float32))  # of weights: bf16 bits, float32

_WORDS = types.Array(types.int64, 1, "C")
_FLOATS = types.Array(types.float32, 1, "C")
_JOBS = types.Array(numba.from_dtype(expert_kernels.JOB), 1, "C")
_INT = types.int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The compiled entry points; all of them run without the GIL."""

    worker_loop: Callable[..., tuple[int, int]]
    start_worker: Callable[[], None]
    wait_for_word: Callable[..., bool]
    atomic_store: Callable[..., None]
    sort_pairs: Callable[..., int]


def _entry_points(version: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions and signatures; each mentions ``version`` so that it is part of its cache key."""

    def worker_loop(words, jobs, seen, index, num_workers, max_spins):
        assert version
        return worker.worker_loop(words, jobs, seen, index, num_workers, max_spins)

    def start_worker():
        assert version
        intrinsics.flush_denormals()

    def wait_for_word(words, index, target, max_spins):
        assert version
        return worker.wait_for_word(words, index, target, max_spins)

    def atomic_store(words, index, value):
        assert version
        intrinsics.atomic_store(words, index, value)

    def sort(expert_P, token_P, weight_P, num_experts, num_tokens, expert, start, token, weight):
        assert version
        return sort_pairs.sort_pairs(
            expert_P, token_P, weight_P, num_experts, num_tokens, expert, start, token, weight
        )

    return {
        "worker_loop": (worker_loop, (_WORDS, _JOBS, _INT, _INT, _INT, _INT)),
        "start_worker": (start_worker, ()),
        "wait_for_word": (wait_for_word, (_WORDS, _INT, _INT, _INT)),
        "atomic_store": (atomic_store, (_WORDS, _INT, _INT)),
        "sort_pairs": (
            sort,
            (_WORDS, _WORDS, _FLOATS, _INT, _INT, _WORDS, _WORDS, _WORDS, _FLOATS),
        ),
    }


def _sources() -> list[Path]:
    modules = (dot_tile, expert_kernels, intrinsics, isa, read_kernel, sort_pairs, worker)
    return [Path(__file__), *(Path(str(module.__file__)) for module in modules)]


def _version() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in _sources())).hexdigest()


def compile_entry(function: Callable[..., Any], signature: tuple[Any, ...]) -> Any:
    """Compile for one signature, or load from the cache; without a cache where that fails.

    A cache fails where no folder can be written or its files are damaged, in many ways; an error in
    the code itself is raised by the second attempt.
    """
    try:
        return _compile(function, signature, cache=True)
    except Exception:
        return _compile(function, signature, cache=False)


def _compile(function: Callable[..., Any], signature: tuple[Any, ...], *, cache: bool) -> Any:
    dispatcher = numba.njit(nogil=True, cache=cache)(function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return dispatcher


@functools.cache
def kernels() -> Kernels:
    """The compiled kernels; the first call on a machine compiles them: :func:`needs_compile`."""
    entries = _entry_points(_version())
    return Kernels(**{name: compile_entry(*entry) for name, entry in entries.items()})


def needs_compile() -> bool:
    """Whether :func:`kernels` will probably have to compile, which takes some ten seconds.

    An estimate from the dates of the cache's files: a cache of another CPU counts as a cache.
    """
    if kernels.cache_info().currsize:
        return False
    try:
        loop = numba.njit(cache=True)(_entry_points("")["worker_loop"][0])
    except RuntimeError:  # no folder for a cache
        return True
    newest_source = max(path.stat().st_mtime for path in _sources())
    entries = Path(str(loop.stats.cache_path)).glob("compiled._entry_points.*worker_loop*.nbc")
    return all(path.stat().st_mtime < newest_source for path in entries)


def warmup(dtype: npt.DTypeLike) -> float:
    """Compile all that weights of ``dtype`` (uint16 for bf16, or float32) need; returns seconds.

    One set of kernels serves both types. ValueError for any other.
    """
    if np.dtype(dtype) not in DTYPES:
        raise ValueError(f"no CPU expert kernels for weights of {np.dtype(dtype)}")
    started = time.perf_counter()
    kernels()
    return time.perf_counter() - started

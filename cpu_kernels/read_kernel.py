"""A plain read of memory by the worker pool: the speed that the expert kernels are held against.

And what has to come before it: pages that nobody has written are all one page of zeros, in cache.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.addresses import i64_array
from cpu_kernels.compiled import stage_address
from cpu_kernels.intrinsics import jit
from cpu_kernels.pieces import GATE_UP, forget_pieces, num_rounds, pieces
from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import JOB_HEADER, TAKEN

HEADER_BYTES = np.dtype(JOB_HEADER).itemsize
# A range of read_words int64 at read, for the first num_readers workers; a result of each at out.
FIELDS = ("num_readers", "read", "read_words", "out", "taken")
READ_JOB = np.dtype([*JOB_HEADER, *((name, np.int64) for name in FIELDS)])
TOUCH_JOB = np.dtype([*JOB_HEADER, ("arena", np.int64), ("num_words", np.int64)])

STREAMS = 4  # parts read side by side, as the kernels do: one alone is slower by a quarter
STREAM_WORDS = 512  # a part, 4 KB: one after the other they are one range, read once
PAGE_WORDS = 512


@jit
def xor_words(address, num_words):
    """The exclusive or of the int64 at ``address``."""
    block = STREAMS * STREAM_WORDS
    total = 0
    for at in range(0, num_words - block + 1, block):
        a, b, c, d = (
            i64_array(address + 8 * at, STREAM_WORDS),
            i64_array(address + 8 * (at + STREAM_WORDS), STREAM_WORDS),
            i64_array(address + 8 * (at + 2 * STREAM_WORDS), STREAM_WORDS),
            i64_array(address + 8 * (at + 3 * STREAM_WORDS), STREAM_WORDS),
        )
        for k in range(STREAM_WORDS):
            total ^= a[k] ^ b[k] ^ c[k] ^ d[k]
    rest = num_words % block
    for word in i64_array(address + 8 * (num_words - rest), rest):
        total ^= word
    return total


def make_read_stage():
    """The range in pieces, then a phase without work; workers beyond ``num_readers`` read nothing.

    Puts the exclusive or of a worker's words at ``out``'s place ``worker``.
    """

    def read_stage(job_address, phase, worker, num_workers):
        num_readers, address, num_words, out, taken = i64_array(job_address + HEADER_BYTES, 5)
        if phase > 0:
            forget_pieces(taken, GATE_UP, worker)
            return
        total = 0
        if worker < num_readers:
            rounds = num_rounds(8 * num_words, num_readers)
            for begin, end in pieces(taken, GATE_UP, num_words, rounds, worker, num_readers):
                total ^= xor_words(address + 8 * begin, end - begin)
        i64_array(out, num_workers)[worker] = total

    return read_stage


def read(pool: WorkerPool, arena: npt.NDArray[Any], num_readers: int) -> int:
    """Read ``arena`` once with the first ``num_readers`` workers: what memory can deliver.

    Returns the exclusive or of its int64 words when all is read. ValueError unless the arena is
    C-contiguous, whole words long, and the pool has as many workers. Ordering: as ring and wait.
    """
    if not arena.flags.c_contiguous or arena.nbytes % 8:
        raise ValueError("the arena must be C-contiguous and a multiple of 8 bytes")
    if not 1 <= num_readers <= pool.num_threads:
        raise ValueError(f"num_readers must be 1 to {pool.num_threads}, not {num_readers}")
    found = np.zeros(pool.num_threads, np.int64)
    sizes = (num_readers, arena.ctypes.data, arena.nbytes // 8, found.ctypes.data)
    job = (stage_address(make_read_stage), 2, *sizes, pool.words[TAKEN:].ctypes.data)
    _run(pool, np.array([job], READ_JOB), (arena, found))
    return int(np.bitwise_xor.reduce(found))


def make_touch_stage():
    """Writes a word of every page of the worker's share, one of equal ones."""

    def touch_stage(job_address, phase, worker, num_workers):
        address, num_words = i64_array(job_address + HEADER_BYTES, 2)
        words = i64_array(address, num_words)
        end = num_words * (worker + 1) // num_workers
        for at in range(num_words * worker // num_workers, end, PAGE_WORDS):
            words[at] = 1

    return touch_stage


def touch(pool: WorkerPool, arena: npt.NDArray[np.int64]) -> None:
    """Give every page memory of its own, near the worker that reads it when all read.

    ``arena`` is C-contiguous. Ordering: as ring and wait.
    """
    job = (stage_address(make_touch_stage), 1, arena.ctypes.data, len(arena))
    _run(pool, np.array([job], TOUCH_JOB), arena)


def _run(pool: WorkerPool, record: npt.NDArray[Any], owner: object) -> None:
    number = pool.add_job(record, owner)
    try:
        pool.ring(number)
        pool.wait()
    finally:
        pool.remove_job(number)

"""How many workers to have here: measured once, then remembered in a file.

As many as read memory nearly as fast as any number does. It is often full long before all cores
read, but prompts and weights that must be decoded are arithmetic, to which every core adds. Where
more only disturb each other there are fewer.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cpu_kernels.compiled import source_hash
from cpu_kernels.isa import VARIABLE, host_isa
from cpu_kernels.read_kernel import read, touch
from cpu_kernels.threads import WorkerPool, default_num_threads
from cpu_kernels.topology import Machine, num_cores, read_cache_bytes, read_machine

LOSS = 0.05  # of plain reads that more workers may cost
CACHES = 4  # the buffer is so many times as large as all last-level caches
MAX_BYTES = 2**30
SECONDS = 0.5  # for all measurements together; each count is read at least once


def best_num_threads(candidates: Iterable[int], measure: Callable[[int], float]) -> int:
    """The largest of the counts whose ``measure`` (more is better) is within LOSS of the best."""
    rates = {count: measure(count) for count in sorted(candidates)}
    return max(count for count, rate in rates.items() if rate >= (1 - LOSS) * max(rates.values()))


def counts_to_try(limit: int) -> list[int]:
    """A handful of counts up to ``limit``; memory is rarely full with less than a third."""
    return sorted({limit, *(max(1, limit * part // 8) for part in (3, 4, 5, 6, 7))})


def measured_num_threads() -> int:
    """The number of workers for this machine, at most the default; takes up to 1 s.

    Later calls find it in ``$XDG_CACHE_HOME/fiddler/cpu.json``, for as long as the machine and
    these sources stay the same. A file that cannot be read or written is as good as none.
    """
    machine = read_machine()
    path, fingerprint = cache_file(), fingerprint_of(machine)
    known = load_count(path, fingerprint)
    if known is None:
        known = _measure(default_num_threads(num_cores(machine)))
        store_count(path, fingerprint, known)
    return known


def fingerprint_of(machine: Machine) -> dict[str, Any]:
    """What the answer depends on, as JSON gives it back.

    ``FIDDLER_ISA`` is a fact only where it takes something from the CPU.
    """
    isa, nodes = host_isa(), sorted(set(machine.node_of.values()))
    return {
        "cpu": isa.cpu,
        "cpus": sorted(machine.core_of),
        "cores": num_cores(machine),
        "nodes": nodes,
        "sources": source_hash(),
        **({VARIABLE: isa.level} if isa.is_lesser else {}),
    }


def cache_file() -> Path:
    """Where the answer is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fiddler" / "cpu.json"


def load_count(path: Path, fingerprint: dict[str, Any]) -> int | None:
    """The number in the file; None if there is none for this machine."""
    try:
        found = json.loads(path.read_text())
        count = found["num_threads"] if found["machine"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if isinstance(count, int) and count >= 1 else None


def why_damaged(path: Path) -> str:
    """Why the file could be of no machine at all; nothing if it could, or is not there."""
    try:
        found = json.loads(path.read_text())
        is_whole = isinstance(found["machine"], dict) and found["num_threads"] >= 1
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except (KeyError, TypeError, IndexError):
        is_whole = False
    except (OSError, ValueError, RecursionError) as error:
        return str(error)
    return "" if is_whole else "it is no number of workers of a machine"


def store_count(path: Path, fingerprint: dict[str, Any], num_threads: int) -> None:
    """Write the file whole or not at all."""
    text = json.dumps({"machine": fingerprint, "num_threads": num_threads})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            whole.write_text(text)
            whole.replace(path)
    except OSError:
        return  # measured again at the next start


def _measure(limit: int) -> int:
    if limit == 1:
        return 1
    counts = counts_to_try(limit)
    with WorkerPool(limit) as pool:
        arena = np.empty(_buffer_bytes() // 8, np.int64)
        touch(pool, arena)

        def bytes_per_s(num_readers: int) -> float:
            times: list[float] = []
            started = time.perf_counter()
            while not times or time.perf_counter() - started < SECONDS / len(counts):
                before = time.perf_counter()
                read(pool, arena, num_readers)
                times.append(time.perf_counter() - before)
            return arena.nbytes / min(times)

        return best_num_threads(counts, bytes_per_s)


def _buffer_bytes() -> int:
    """Several times the caches, within MAX_BYTES and a quarter of the free memory; whole pages."""
    wanted = CACHES * (read_cache_bytes() or 64 * 2**20)
    return max(2**20, min(wanted, MAX_BYTES, _free_bytes() // 4)) // 4096 * 4096


def _free_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    free = (int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return next(free, 2 * MAX_BYTES // 1024) * 1024

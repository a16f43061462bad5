"""Which CPUs this process may use and how they share cores, memory and time.

:func:`read_machine` looks at the kernel's files once; all else here is pure.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("devices/system")  # under /sys
FULL_CAPACITY = 1024  # of the fastest core, in the kernel's scale
SPARE_TO_PIN = 2  # cores
SMALL_CAPACITY = 512  # of an efficiency core whose kernel gives no capacities


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the kernel says of the CPUs that this process may run on."""

    core_of: Mapping[
        int, int
    ]  # CPU -> first hyper-thread of its core; the keys are what we may use
    node_of: Mapping[int, int]  # CPU -> NUMA node
    capacity_of: Mapping[int, int]  # CPU -> speed, FULL_CAPACITY: the fastest
    quota_cores: int | None  # whole cores of a container's time limit; None: no limit


def cores(machine: Machine) -> list[int]:
    """One CPU for each physical core, by number."""
    return sorted(
        {core: cpu for cpu, core in sorted(machine.core_of.items(), reverse=True)}.values()
    )


def num_cores(machine: Machine) -> int:
    """Cores this process may use: affinity and container quota count, hyper-threads do not."""
    return max(1, min(len(cores(machine)), machine.quota_cores or len(cores(machine))))


def spread(machine: Machine, num_threads: int) -> list[int] | None:
    """A CPU for each of ``num_threads`` threads, each on its own core; None: leave them unpinned.

    Any first n of them are spread evenly over the NUMA nodes. Fast cores go first, and of those
    the ones with high numbers: interrupts and other programs like the low ones.

    Threads are pinned only if two cores are left over, for the caller and for whoever else is
    busy: the system can move those away from a pinned thread, but not the thread from them. On 2
    cores, 2 pinned workers beside a busy process took twice as long for a job as free ones (1.4
    against 0.7 ms). A quota says that others use these cores too.
    """
    free = cores(machine)
    if len(free) - num_threads < SPARE_TO_PIN or machine.quota_cores is not None:
        return None
    queues: dict[int, list[int]] = {}
    for cpu in sorted(free, key=lambda cpu: (-machine.capacity_of[cpu], -cpu)):
        queues.setdefault(machine.node_of[cpu], []).append(cpu)
    turns = [
        (place, node, cpu) for node, queue in queues.items() for place, cpu in enumerate(queue)
    ]
    return [cpu for _, _, cpu in sorted(turns)[:num_threads]]


def numbers_of_list(text: str) -> Iterator[int]:
    """The numbers in the kernel's list format: "0-2,8" is 0, 1, 2, 8."""
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first:
            yield from range(int(first), int(last or first) + 1)


def cores_of_quota(cpu_max: str) -> int | None:
    """Whole cores that a cgroup's ``cpu.max`` allows ("200000 100000": 2); None: all."""
    quota, period = cpu_max.split()
    return None if quota == "max" else max(1, int(quota) // int(period))


def bytes_of_size(size: str) -> int:
    """The kernel's cache sizes: "36608K"."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(size.rstrip("KMG")) * units.get(size[-1], 1)


# --- the kernel's files ---


def read_machine(root: Path = Path("/"), allowed: set[int] | None = None) -> Machine:
    """Look at the machine whose files lie under ``root``; ``allowed`` CPUs, None: of this process.

    Where a file is missing (another system than Linux): each CPU is a core, on one node.
    """
    cpus = sorted(_allowed() if allowed is None else allowed)
    system = root / "sys" / SYSTEM
    small = set(numbers_of_list(_text(root / "sys/devices/cpu_atom/cpus")))  # Intel's name for them
    nodes = sorted((system / "node").glob("node[0-9]*"))
    node_of = {
        cpu: int(node.name.removeprefix("node"))
        for node in nodes
        for cpu in numbers_of_list(_text(node / "cpulist"))
    }
    return Machine(
        core_of={cpu: _core(system, cpu) for cpu in cpus},
        node_of={cpu: node_of.get(cpu, 0) for cpu in cpus},
        capacity_of={cpu: _capacity(system, cpu, cpu in small) for cpu in cpus},
        quota_cores=_quota(root),
    )


def read_cache_bytes(root: Path = Path("/"), allowed: set[int] | None = None) -> int:
    """All caches of the highest level that ``allowed`` CPUs have, each once; 0: unknown."""
    found: dict[tuple[int, str], int] = {}
    for cpu in _allowed() if allowed is None else allowed:
        for index in (root / "sys" / SYSTEM / f"cpu/cpu{cpu}/cache").glob("index[0-9]*"):
            level, size = _text(index / "level"), _text(index / "size")
            if level and size:
                found[int(level), _text(index / "shared_cpu_list")] = bytes_of_size(size)
    top = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == top)


def can_pin() -> bool:
    """Whether threads can be tied to CPUs on this system."""
    return hasattr(os, "sched_setaffinity") and platform.system() == "Linux"


def _allowed() -> set[int]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return set(affinity(0)) if affinity else set(range(os.cpu_count() or 1))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _core(system: Path, cpu: int) -> int:
    return min(
        numbers_of_list(_text(system / f"cpu/cpu{cpu}/topology/thread_siblings_list")), default=cpu
    )


def _capacity(system: Path, cpu: int, is_small: bool) -> int:
    given = _text(system / f"cpu/cpu{cpu}/cpu_capacity")
    return int(given) if given else SMALL_CAPACITY if is_small else FULL_CAPACITY


def _quota(root: Path) -> int | None:
    """The tightest limit of our control group and those above it."""
    groups = root / "sys/fs/cgroup"
    lines = _text(root / "proc/self/cgroup").splitlines()
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    folders = [groups / own, *(groups / own).parents]
    texts = [_text(folder / "cpu.max") for folder in folders if folder.is_relative_to(groups)]
    limits = [cores_of_quota(text) for text in texts if text]
    return min((limit for limit in limits if limit), default=None)

"""What this machine has: GPU, memory as this process may use it, cores.

Torch is imported only where a CUDA driver is found.
"""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from fiddler.errors import ConfigError
from offload.gpu_probe import probe_gpu

CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
# controllers as /proc/self/cgroup names them (version 2 names none) -> folder, limit, usage, cache
CGROUP_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine at one moment; all sizes are bytes.

    ``vram_free_bytes`` is what the driver calls free once this process holds a CUDA context, and
    ``cuda_context_bytes`` what that context took, so the process may use their sum. RAM is what
    the machine and the process's cgroup both allow. Without a GPU the GPU fields are "" and 0.
    """

    has_gpu: bool
    gpu_name: str
    vram_total_bytes: int
    vram_free_bytes: int
    cuda_context_bytes: int
    ram_total_bytes: int
    ram_available_bytes: int
    physical_cores: int
    cpu_name: str
    driver: str = ""  # version of the GPU's driver, where it says
    gpu_capability: tuple[int, int] | None = None  # compute capability

    def without_gpu(self) -> Self:
        """The same machine, its GPU left aside."""
        return replace(
            self,
            has_gpu=False,
            gpu_name="",
            vram_total_bytes=0,
            vram_free_bytes=0,
            cuda_context_bytes=0,
            driver="",
            gpu_capability=None,
        )


def probe(device: str = "auto") -> Hardware:
    """Look at this machine; ``device`` is ``auto``, ``cuda`` or ``cpu``.

    Creates this process's CUDA context when a GPU is used. Raises :class:`ConfigError` where CUDA
    is asked for and there is none.
    """
    assert device in ("auto", "cuda", "cpu"), device
    gpu = probe_gpu() if device != "cpu" else None
    if device == "cuda" and gpu is None:
        raise ConfigError(
            "CUDA was asked for, but this process sees no CUDA device",
            hint="use --device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )
    ram_total, ram_available = _ram()
    return Hardware(
        has_gpu=gpu is not None,
        gpu_name=gpu.name if gpu else "",
        vram_total_bytes=gpu.total_bytes if gpu else 0,
        vram_free_bytes=gpu.free_bytes if gpu else 0,
        cuda_context_bytes=gpu.context_bytes if gpu else 0,
        ram_total_bytes=ram_total,
        ram_available_bytes=ram_available,
        physical_cores=_physical_cores(),
        cpu_name=_cpu_name(),
        driver=gpu.driver if gpu else "",
        gpu_capability=gpu.capability if gpu else None,
    )


# --- memory ---


def _ram() -> tuple[int, int]:
    """Total and available bytes of RAM, the narrower of the machine's and the cgroup's."""
    total, available = _machine_ram()
    for limit, used in _cgroup_memory():
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return total, available


def _machine_ram() -> tuple[int, int]:
    try:
        import psutil
    except ImportError:
        return _meminfo()
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _meminfo() -> tuple[int, int]:
    """Total and available bytes from the kernel's own table (kB a line)."""
    rows = (line.split() for line in MEMINFO.read_text().splitlines())
    kilobytes = {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) >= 2}
    return kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024


def _cgroup_memory() -> list[tuple[int, int]]:
    """(limit, used) bytes of every memory cgroup around this process, reclaimable cache not used.

    An unlimited group says "max" (version 2) or an absurdly large number (version 1).
    """
    found = []
    for folder, limit_name, usage_name, cache_name in _memory_cgroups():
        with suppress(OSError, ValueError, KeyError):
            limit = int((folder / limit_name).read_text())
            stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / usage_name).read_text()) - int(stat[cache_name])
            found.append((limit, max(0, used)))
    return found


def _memory_cgroups() -> list[tuple[Path, str, str, str]]:
    """Folders from this process's memory cgroup up to the root, with the names of their files."""
    found = []
    with suppress(OSError):
        for line in CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in CGROUP_FILES:
                subfolder, limit, usage, cache = CGROUP_FILES[controllers]
                root = CGROUP_ROOT / subfolder
                own = root / path.lstrip("/")
                chain = [folder for folder in [own, *own.parents] if folder.is_relative_to(root)]
                found += [(folder, limit, usage, cache) for folder in chain]
    return found


# --- processor ---


def _physical_cores() -> int:
    """Cores without their hyper-threads, at most as many as this process may run on."""
    try:
        import psutil

        cores = psutil.cpu_count(logical=False)
    except ImportError:
        cores = len({(cpu.get("physical id"), cpu.get("core id")) for cpu in _cpuinfo()})
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    usable = [count for count in (cores, allowed) if count]
    return min(usable) if usable else os.cpu_count() or 1


def _cpuinfo() -> list[dict[str, str]]:
    """One dictionary per logical processor; empty where the kernel has no such table."""
    try:
        blocks = CPUINFO.read_text().split("\n\n")
    except OSError:
        return []
    pairs = ([line.partition(":") for line in block.splitlines()] for block in blocks)
    return [{key.strip(): value.strip() for key, _, value in block} for block in pairs if block]


def _cpu_name() -> str:
    names = [cpu["model name"] for cpu in _cpuinfo() if "model name" in cpu]
    return names[0] if names else platform.processor() or platform.machine()

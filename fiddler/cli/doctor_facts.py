"""What ``fiddler doctor`` looks at. Whatever is missing or broken is a fact too, not an error."""

import ctypes
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fiddler.cli.doctor_gpu import Gpu, gpu_facts, handoff_facts, link_facts, node_facts
from fiddler.cli.doctor_memory import Cache, cache_facts, memory_facts
from fiddler.cli.errors import ISA_VARIABLE

if TYPE_CHECKING:
    from fiddler.speed import RatesHere
    from offload.hardware import Hardware
    from offload.link_probe import Link

PACKAGES = (
    "torch",
    "triton",
    "numba",
    "numpy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "psutil",
)
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
NUMA_NODES = Path("/sys/devices/system/node")


@dataclass(frozen=True, slots=True)
class Seen:
    """The machine as a plan sees it, and the rates by which speeds are predicted for it."""

    hardware: "Hardware"
    used: "RatesHere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One machine. None: not there, or not to be found out; ``failures`` says why."""

    fiddler: str
    python: str
    system: str
    packages: dict[str, str | None]
    triton_wanted: str | None = None  # the exact version that this torch asks for
    torch_cuda: str | None = None  # the CUDA that torch was built for
    driver: str | None = None
    driver_cuda: str | None = None  # the newest CUDA that the driver knows
    gpu: Gpu | None = None
    handoff: str | None = None  # how a GPU stream hands work to the CPU
    handoff_problems: dict[str, str] = field(default_factory=dict)  # why a faster way does not work
    cpu: str | None = None
    isa: str | None = None
    forced_isa: str | None = None  # what FIDDLER_ISA says
    is_lesser_isa: bool = False  # whether that takes something from the CPU
    isa_refusal: str | None = None  # why that cannot be
    has_avx2: bool | None = None  # None also if FIDDLER_ISA may hide it
    num_workers: int | None = None  # as a start has measured it
    physical_cores: int | None = None
    numa_nodes: int | None = None
    link: "Link | None" = None  # of the GPU, under load
    gpu_node: int | None = None  # of NUMA
    cpu_nodes: list[int] = field(default_factory=list)  # whose CPUs this process may use
    memory_nodes: int | None = None  # nodes that have memory,
    allowed_nodes: int | None = None  # and those of them that this process may use
    huge_pages: str | None = None  # always, madvise or never
    memlock_bytes: int | None = None  # None: no limit
    caches: dict[str, Cache] = field(default_factory=dict)
    rates_of: str | None = None  # the machine by whose rates speeds are predicted
    why_not_own: str | None = None  # why that is another one
    damaged: list[str] = field(default_factory=list)  # measurements that are kept and unusable
    ram_total_bytes: int | None = None
    ram_available_bytes: int | None = None
    cache: str | None = None
    cache_free_bytes: int | None = None
    cache_is_writable: bool | None = None
    failures: dict[str, str] = field(default_factory=dict)
    seen: Seen | None = None  # what costs are told from

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; what was ``seen`` is told in words."""
        record = asdict(replace(self, seen=None))
        del record["seen"]
        return record


def collect() -> Facts:
    """Look at everything; each look may fail without hiding the others."""
    from fiddler._version import __version__

    found: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, look in LOOKS.items():
        try:
            found |= look()
        except Exception as error:  # broken installations fail in every way
            failures[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
    return Facts(
        fiddler=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        failures=failures,
        **found,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numba() -> dict[str, Any]:
    importlib.import_module("numba")
    return {}


def _torch() -> dict[str, Any]:
    import torch

    requirements = importlib.metadata.requires("torch") or []
    wanted = [re.match(r"triton\s*\(?==\s*([\d.]+)", line) for line in requirements]
    versions = [match[1] for match in wanted if match]
    return {"torch_cuda": torch.version.cuda, "triton_wanted": next(iter(versions), None)}


def _driver() -> dict[str, Any]:
    """Versions from the kernel's module and from libcuda; nothing where there is no driver."""
    found: dict[str, Any] = {}
    if DRIVER_VERSION.exists():
        match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", DRIVER_VERSION.read_text())
        found["driver"] = match[1] if match else None
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return found
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
        found["driver_cuda"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return found


def _machine() -> dict[str, Any]:
    from offload.hardware import probe

    machine = probe("cpu")  # the GPU has its own look
    nodes = list(NUMA_NODES.glob("node[0-9]*"))
    return {
        "cpu": machine.cpu_name,
        "physical_cores": machine.physical_cores,
        "numa_nodes": len(nodes) or None,
        "ram_total_bytes": machine.ram_total_bytes,
        "ram_available_bytes": machine.ram_available_bytes,
    }


def _isa() -> dict[str, Any]:
    forced = os.environ.get(ISA_VARIABLE) or None
    try:
        from cpu_kernels.isa import host_isa
    except ValueError as error:
        if forced is None:
            raise
        return {"forced_isa": forced, "isa_refusal": str(error)}
    isa = host_isa()
    has_avx2 = "avx2" in isa.extensions if isa.is_x86 and forced is None else None
    return {
        "isa": isa.summary(),
        "forced_isa": forced,
        "is_lesser_isa": isa.is_lesser,
        "has_avx2": has_avx2,
        **_workers(),
    }


def _workers() -> dict[str, Any]:
    from cpu_kernels.thread_count import cache_file, fingerprint_of, load_count
    from cpu_kernels.topology import read_machine

    return {"num_workers": load_count(cache_file(), fingerprint_of(read_machine()))}


@contextmanager
def unsaid() -> Iterator[list[warnings.WarningMessage]]:
    """What is warned of meanwhile is listed, and told as a finding; nothing is logged."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logging.disable()
        try:
            yield warned
        finally:
            logging.disable(logging.NOTSET)


def _rates() -> dict[str, Any]:
    """What is known of this machine's speed; nothing where FIDDLER_ISA keeps kernels out."""
    try:
        from cpu_kernels.thread_count import cache_file, why_damaged
    except ValueError:
        return {}
    from fiddler.speed import rates_for
    from offload.hardware import probe

    hardware = probe()
    with unsaid() as warned:
        used = rates_for(hardware)
    # "FILE cannot be used (WHY): all has to be measured anew"
    damaged = [text.rpartition(": ")[0] for text in map(str, (w.message for w in warned))]
    if why := why_damaged(cache_file()):
        damaged.append(f"{cache_file()} cannot be used ({why})")
    found = {"seen": Seen(hardware, used), "damaged": damaged}
    if not used.name:
        return {**found, "rates_of": "this machine"}
    why_not = used.why_not_own or "it was calibrated without its GPU"
    return {**found, "rates_of": used.name, "why_not_own": why_not}


def _cache() -> dict[str, Any]:
    from fiddler.hub.cache import free_bytes
    from fiddler.hub.options import HubOptions

    folder = HubOptions().cache
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {
        "cache": str(folder),
        "cache_free_bytes": free_bytes(folder),
        "cache_is_writable": os.access(existing, os.W_OK),
    }


LOOKS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "numba": _numba,
    "driver": _driver,
    "GPU": gpu_facts,
    "hand-off": handoff_facts,
    "PCIe": link_facts,
    "machine": _machine,
    "memory": memory_facts,
    "NUMA": node_facts,
    "caches": cache_facts,
    "instructions": _isa,
    "rates": _rates,
    "cache": _cache,
}

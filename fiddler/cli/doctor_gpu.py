"""What ``fiddler doctor`` looks at on a GPU; nothing is found where there is none."""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PCI_DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The first CUDA device, as torch sees it; sizes are bytes."""

    name: str
    count: int
    capability: str
    vram_total_bytes: int
    vram_free_bytes: int


def gpu_facts() -> dict[str, Any]:
    """The first device and its memory."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    gpu = Gpu(
        name=torch.cuda.get_device_name(0),
        count=torch.cuda.device_count(),
        capability=f"{major}.{minor}",
        vram_total_bytes=total,
        vram_free_bytes=free,
    )
    return {"gpu": gpu}


def link_facts() -> dict[str, Any]:
    """PCIe under load."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from offload.link_probe import measure_link

    return {"link": measure_link()}


def node_facts() -> dict[str, Any]:
    """The NUMA node of the first GPU, and those of the CPUs that this process may use."""
    from cpu_kernels.topology import read_machine

    found: dict[str, Any] = {"cpu_nodes": sorted(set(read_machine().node_of.values()))}
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return found
    name = ctypes.create_string_buffer(32)
    if library.cuInit(0) == 0 and library.cuDeviceGetPCIBusId(name, 32, 0) == 0:
        node = PCI_DEVICES / name.value.decode().lower() / "numa_node"
        if node.exists() and (number := int(node.read_text())) >= 0:  # -1: none is known
            found["gpu_node"] = number
    return found


def handoff_facts() -> dict[str, Any]:
    """How a stream can hand work to the CPU, and why not in faster ways."""
    import torch

    if not torch.cuda.is_available():
        return {}
    from offload.handoff_probe import choose_way, forced_way, probe

    found = probe()
    return {
        "handoff": choose_way(found, forced_way()),
        "handoff_problems": found.problems,
    }

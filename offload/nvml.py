"""The few NVML calls that say what a process holds on a GPU as the driver counts it."""

import ctypes
from dataclasses import dataclass
from typing import Any

SUCCESS = 0
NOT_AVAILABLE = (1 << 64) - 1  # the driver hides the figure (WDDM, MIG, some containers)
MAX_PROCESSES = 256
VERSION_BYTES = 80


class _Memory(ctypes.Structure):
    _fields_ = [
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    ]


class _Process(ctypes.Structure):
    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU as NVML knows it."""

    library: Any
    handle: ctypes.c_void_p

    def used_bytes(self) -> int:
        """Memory in use by everybody; 0 if the driver does not say."""
        memory = _Memory()
        status = self.library.nvmlDeviceGetMemoryInfo(self.handle, ctypes.byref(memory))
        return int(memory.used) if status == SUCCESS else 0

    def driver_version(self) -> str:
        """As ``580.65.06``; empty if the driver does not say."""
        text = ctypes.create_string_buffer(VERSION_BYTES)
        status = self.library.nvmlSystemGetDriverVersion(text, VERSION_BYTES)
        return text.value.decode() if status == SUCCESS else ""

    def process_bytes(self, pid: int) -> int | None:
        """Memory that ``pid`` holds, its CUDA context included; None if the driver hides it."""
        count = ctypes.c_uint(MAX_PROCESSES)
        rows = (_Process * MAX_PROCESSES)()
        query = getattr(self.library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        if query is None or query(self.handle, ctypes.byref(count), rows) != SUCCESS:
            return None
        for row in rows[: count.value]:
            if row.pid == pid and row.used_bytes != NOT_AVAILABLE:
                return int(row.used_bytes)
        return None

    def pcie(self, which: str) -> tuple[int, int] | None:
        """Generation and lanes of its link, ``Curr``ently or at ``Max``; None if hidden."""
        found = []
        for what in ("Generation", "Width"):
            query = getattr(self.library, f"nvmlDeviceGet{which}PcieLink{what}", None)
            value = ctypes.c_uint()
            if query is None or query(self.handle, ctypes.byref(value)) != SUCCESS:
                return None
            found.append(int(value.value))
        return found[0], found[1]


def open_device(uuid: str) -> Device | None:
    """Find the GPU with this UUID (with or without ``GPU-``); None where NVML is missing.

    By UUID, since CUDA_VISIBLE_DEVICES renumbers CUDA's devices but not NVML's.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle = ctypes.c_void_p()
    name = (uuid if uuid.startswith("GPU-") else f"GPU-{uuid}").encode()
    if library.nvmlInit_v2() != SUCCESS:
        return None
    status = library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle))
    return Device(library, handle) if status == SUCCESS else None

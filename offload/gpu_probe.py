"""What the GPU has and what a CUDA context takes of it; torch only where there is a driver."""

import ctypes
import os
from dataclasses import dataclass

from offload import nvml

# By UUID, NVML's figure before this process had a context there: whoever looks again later wants it
_used_before: dict[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The current CUDA device; ``free_bytes`` once this process holds its context."""

    name: str
    driver: str  # its version; empty if it is hidden
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    context_bytes: int


def probe_gpu() -> Gpu | None:
    """Look at the current CUDA device, creating the context; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None  # no driver, so torch (1.3 s to import) need not be asked
    import torch

    if not torch.cuda.is_available():
        return None
    had_context: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    index = torch.cuda.current_device() if had_context else 0
    uuid = device_uuid(driver, index)
    device = nvml.open_device(uuid)
    if device and not had_context:
        _used_before[uuid] = device.used_bytes()
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    used_before = _used_before[uuid] + reserved if uuid in _used_before else None
    context = context_bytes(device, used_before, reserved, total - free)
    name = torch.cuda.get_device_name(index)
    return Gpu(
        name=name,
        driver=device.driver_version() if device else "",
        capability=torch.cuda.get_device_capability(index),
        total_bytes=total,
        free_bytes=free,
        context_bytes=context,
    )


def context_bytes(
    device: nvml.Device | None, used_before: int | None, reserved: int, used_now: int
) -> int:
    """What the driver counts for this process beyond torch's pool, by the best means there is.

    1. NVML's figure for this process (hidden in most containers, whose process ids differ);
    2. how much the device's used memory has grown since before the context was made
       (``used_before``: NVML's figure then, and torch's pool; None: nobody looked);
    3. all used memory: too much where others share the GPU, which errs on the safe side.
    """
    if device is not None:
        mine = device.process_bytes(os.getpid())
        if mine is not None and mine > reserved:
            return mine - reserved
        if used_before and (growth := device.used_bytes() - used_before) > 0:
            return growth
    return max(0, used_now - reserved)


def device_uuid(driver: ctypes.CDLL, index: int) -> str:
    """UUID of CUDA's device ``index``, from the driver: asking torch might make the context."""
    raw = (ctypes.c_ubyte * 16)()
    handle = ctypes.c_int()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    driver.cuDeviceGetUuid(ctypes.byref(raw), handle)
    text = bytes(raw).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

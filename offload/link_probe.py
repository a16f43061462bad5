"""The GPU's PCIe link while it works: idle links slow down to save power and say so.

Ordering: all copies are enqueued on torch's current stream, the driver is asked while they run, and
the host waits for the stream before it reads the events' time.
"""

import ctypes
from dataclasses import dataclass

import torch

from offload import nvml
from offload.gpu_probe import device_uuid
from offload.units import MIB

COPY_BYTES = 64 * MIB
COPIES = 48  # 3 GiB: 60 ms at 55 GB/s, half a second on a slow link


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Generation and lanes under load, and at most; None where the driver hides them.

    ``copy_gbps``: 1e9 bytes a second from pinned host memory, one large copy after the other.
    """

    generation: int | None
    width: int | None
    max_generation: int | None
    max_width: int | None
    copy_gbps: float


def measure_link() -> Link:
    """Copy for a moment and look meanwhile; RuntimeError where no memory can be pinned."""
    index = torch.cuda.current_device()
    device = nvml.open_device(device_uuid(ctypes.CDLL("libcuda.so.1"), index))
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target.copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()
    begin, end = _timer(), _timer()
    begin.record()
    for _ in range(COPIES):
        target.copy_(pinned, non_blocking=True)
    end.record()
    now = device.pcie("Curr") if device is not None else None
    most = device.pcie("Max") if device is not None else None
    torch.cuda.synchronize()
    seconds = begin.elapsed_time(end) / 1e3
    return Link(
        generation=now and now[0],
        width=now and now[1],
        max_generation=most and most[0],
        max_width=most and most[1],
        copy_gbps=COPIES * COPY_BYTES / seconds / 1e9,
    )


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

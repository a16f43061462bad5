"""How the kernel benchmarks measure: medians with a cold L2, against limits of the same process.

Ratios of one process hold whatever the GPU's clocks do.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

PEAK_BYTES = 1 << 30
FLUSH_BYTES = 256 << 20  # several times the largest L2
LEAST_TIMES, MOST_TIMES, MEASURED_MS = 20, 400, 80.0


@dataclass(frozen=True, slots=True)
class Peaks:
    """Bytes per second in GB/s: plain read of 1 GiB, and its copy (read plus written)."""

    read_gbps: float
    copy_gbps: float


def median_ms(run: Callable[[], object]) -> float:
    """Median milliseconds of ``run`` on the GPU, with nothing of its data in the L2.

    The L2 is filled by a read: lines that a write leaves there go to memory at ``run``'s cost, 10
    us for 256 MiB of zeros.
    """
    run()  # compiles
    torch.cuda.synchronize()
    times, waited_ms = _times_ms(run, LEAST_TIMES), 0.0
    while waited_ms < MEASURED_MS and len(times) < MOST_TIMES:
        more = _times_ms(run, LEAST_TIMES)
        times, waited_ms = times + more, waited_ms + sum(more)
    return statistics.median(times)


def _times_ms(run: Callable[[], object], count: int) -> list[float]:
    """Of so many runs, enqueued one behind the other so that the host stays ahead."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]  # type: ignore[no-untyped-call]
    for begin, end in events:
        _flush().amax()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


@functools.cache
def _flush() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


@functools.cache
def read_ms(num_bytes: int) -> float:
    """The fastest plain read of that many bytes: torch's sum or maximum, of floats or integers."""
    floats = torch.ones(num_bytes // 4, dtype=torch.float32, device="cuda")
    integers = floats.view(torch.int32)
    return min(median_ms(read) for read in (floats.sum, floats.amax, integers.amax))


@functools.cache
def matmul_tflops(size: int = 8192) -> float:
    """torch's rate for a product of two bf16 matrices of normal numbers."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / median_ms(lambda: a @ b) / 1e9


def measure_peaks() -> Peaks:
    source = torch.ones(PEAK_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return Peaks(
        read_gbps=PEAK_BYTES / read_ms(PEAK_BYTES) / 1e6,
        copy_gbps=2 * PEAK_BYTES / median_ms(lambda: target.copy_(source)) / 1e6,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as the replay of a CUDA graph: its launches cost the host nothing."""
    run()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def graph_ms(run: Callable[[], object]) -> float:
    """``median_ms`` of ``run`` in a CUDA graph."""
    return median_ms(captured(run))

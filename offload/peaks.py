"""Measures what :mod:`offload.limits` divides by: reads, copies and products at their fastest.

Ordering: torch's stream copies from pinned memory on its own while the worker pool reads another
buffer; who wants to know whether the copies are done asks their event.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from cpu_kernels.arena import Arena
from cpu_kernels.read_kernel import read
from cpu_kernels.thread_count import CACHES, MAX_BYTES
from cpu_kernels.threads import WorkerPool
from cpu_kernels.topology import read_cache_bytes
from offload.hardware import Hardware
from offload.limits import GIGA, TERA, Peaks
from offload.units import GIB, MIB

TIMES = 7  # measurements of each thing; the fastest counts, as a limit must not be exceeded
CALLS = 10  # on a GPU, enqueued together: a launch takes 10 us, a read of 1 GiB 250
GPU_BYTES = GIB  # many times any GPU's cache
PINNED_BYTES = 256 * MIB
PULLS = 32  # copies of that size while the CPU reads: 0.16 s at 50 GB/s
GPU_ROWS, CPU_ROWS = 8192, 1024  # of the square matrices that are multiplied
ROW_DEPTH = 2048  # of those that one row is multiplied with


def measure_peaks(hardware: Hardware, *, num_threads: int, dtype: str) -> Peaks:
    """Measure this machine with ``num_threads`` workers; takes seconds, and memory meanwhile.

    ``dtype`` is that of the products, as torch calls it.
    """
    with WorkerPool(num_threads) as pool:
        arena = filled_arena(hardware.ram_available_bytes)
        cpu_read_bps = arena.nbytes / fastest_s(lambda: read(pool, arena, num_threads))
        if hardware.has_gpu:
            return _with_gpu(pool, arena, cpu_read_bps, dtype)
    return Peaks(
        cpu_read_gbps=cpu_read_bps / GIGA,
        joint_gbps=cpu_read_bps / GIGA,
        pcie_gbps=0.0,
        gpu_read_gbps=0.0,
        gemm_tflops=gemm_flops("cpu", CPU_ROWS, dtype) / TERA,
    )


def _with_gpu(
    pool: WorkerPool, arena: npt.NDArray[np.int64], cpu_read_bps: float, dtype: str
) -> Peaks:
    import torch

    source = torch.ones(GPU_BYTES // 4, device="cuda")
    gpu_read_s = min(gpu_s(source.sum), gpu_s(source.amax))
    pinned = torch.ones(PINNED_BYTES // 4, pin_memory=True)
    target = source[: len(pinned)]

    def copy() -> None:
        target.copy_(pinned, non_blocking=True)

    pcie_s = gpu_s(copy)
    joint_bps = max(sum(read_beside(pool, arena, copy)) for _ in range(TIMES))
    return Peaks(
        cpu_read_gbps=cpu_read_bps / GIGA,
        joint_gbps=max(joint_bps, cpu_read_bps) / GIGA,  # nobody has to use both
        pcie_gbps=PINNED_BYTES / pcie_s / GIGA,
        gpu_read_gbps=GPU_BYTES / gpu_read_s / GIGA,
        gemm_tflops=gemm_flops("cuda", GPU_ROWS, dtype) / TERA,
    )


def read_beside(
    pool: WorkerPool, arena: npt.NDArray[np.int64], bring: Callable[[], None]
) -> tuple[float, float]:
    """Bytes a second that host memory gives the workers, and ``bring``, at the same time.

    ``bring`` has torch's stream fetch PINNED_BYTES of pinned memory.
    """
    import torch

    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    num_reads = 0
    started = time.perf_counter()
    for _ in range(PULLS):
        bring()
    done.record()
    while not done.query():  # type: ignore[no-untyped-call]
        read(pool, arena, pool.num_threads)
        num_reads += 1
    elapsed = time.perf_counter() - started  # the last read may outlast the copies by a part of it
    return num_reads * arena.nbytes / elapsed, PULLS * PINNED_BYTES / elapsed


def gemm_flops(device: str, rows: int, dtype: str) -> float:
    """Operations a second of a product of two square matrices."""
    import torch

    a, b = torch.randn(2, rows, rows, dtype=getattr(torch, dtype), device=device)

    def multiply() -> object:
        return a @ b

    return 2 * rows**3 / (gpu_s(multiply) if device == "cuda" else fastest_s(multiply))


def row_bytes_per_s() -> float:
    """What torch reads of float32 weights on the CPU where one row is multiplied with them.

    Matrices as a model has them, one after the other, more than the caches hold.
    """
    import torch

    num_bytes = min(2 * (read_cache_bytes() or 64 * MIB), MAX_BYTES)
    num_matrices = max(4, num_bytes // (4 * ROW_DEPTH**2))
    x_1K, weights_MNK = torch.ones(1, ROW_DEPTH), torch.ones(num_matrices, ROW_DEPTH, ROW_DEPTH)

    def multiply_all() -> None:
        for w_NK in weights_MNK:
            torch.nn.functional.linear(x_1K, w_NK)

    return 4 * weights_MNK.numel() / fastest_s(multiply_all)


def gpu_s(enqueue: Callable[[], object]) -> float:
    """Seconds that one call keeps the GPU busy."""
    import torch

    def run() -> None:
        for _ in range(CALLS):
            enqueue()
        torch.cuda.synchronize()

    return fastest_s(run) / CALLS


def fastest_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of TIMES calls, after one that warms up."""
    work()
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def filled_arena(free_bytes: int) -> npt.NDArray[np.int64]:
    """Memory several times the caches. Written, or all its pages would be one page of zeros."""
    wanted = CACHES * (read_cache_bytes() or 64 * MIB)
    size = max(MIB, min(wanted, MAX_BYTES, free_bytes // 4))
    words: npt.NDArray[np.int64] = Arena(size).array(np.int64, (size // 8,))
    words.fill(1)
    return words

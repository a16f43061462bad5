"""Measures a machine's rates, one step after the other, in about a minute.

A step adds some of the fields of :class:`offload.machine_rates.MachineRates`. Each frees what it
has used, so that the next one has the memory.
"""

import errno
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_kernels.arena import Arena
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.precompile import PACK, READ, TOUCH, WORKERS, uncached
from cpu_kernels.thread_count import CACHES, MAX_BYTES
from cpu_kernels.times import measure_times
from cpu_kernels.topology import read_cache_bytes
from cpu_kernels.weight_kind import parse_kind
from offload.hardware import Hardware
from offload.limits import GIGA, TERA
from offload.machine_rates import ExpertTimes, MachineRates
from offload.peaks import CPU_ROWS, fastest_s, gemm_flops, measure_peaks, row_bytes_per_s
from offload.sample_experts import sample_bytes, sample_experts
from offload.units import MIB

# weights and what activations are rounded to, as the engine computes them
KERNELS: tuple[tuple[str, Activations], ...] = (
    *(("bf16", "f32"), ("bf16", "bf16"), ("bf12", "f32"), ("bf12", "bf16")),
    *(("w8g128", "f32"), ("w4g128", "f32")),
    *(("w8g128", "int8"), ("w4g128", "int8")),
)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEW_TOKENS = (1, 2, 4, 8, 16, 32)
MANY_THREADS = 8  # fewer take seconds for 256 tokens of a large expert; 14 take 8 to 50 ms
CALLS = 200  # of a small operation, timed together
DISK_BYTES = 256 * MIB
DISK_BLOCK = 8 * MIB
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Experts that are measured, ``routed`` a call: as many as fill several times the caches."""

    hidden: int
    width: int
    routed: int
    budget_s: float
    is_large: bool

    def tokens(self, num_threads: int) -> tuple[int, ...]:
        """By how many at once: from 32 to 256, the time of a token falls by a third."""
        return FEW_TOKENS if self.is_large and num_threads < MANY_THREADS else TOKENS


# 12.6 MB in bf16, 4 a call, as models with many experts have them; 176 MB, one a call
SIZES = (
    Size(hidden=2048, width=1024, routed=4, budget_s=2.5, is_large=False),
    Size(hidden=4096, width=7168, routed=1, budget_s=1.0, is_large=True),
)
LEAST_ARENA = 512 * MIB  # two large experts; more where that is no multiple of the caches


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is measured, and with how many workers; ``folder`` is on the disk that counts."""

    hardware: Hardware
    num_threads: int
    dtype: str  # of products, as torch calls it
    folder: Path


@dataclass(frozen=True, slots=True)
class Step:
    """``measure`` returns fields of the rates. ``on_gpu``: left out where there is none."""

    title: str
    measure: Callable[[Setting], dict[str, Any]]
    on_gpu: bool = False


def measure_rates(
    setting: Setting, steps: Sequence[Step], on_step: Callable[[str, int, int], None]
) -> MachineRates:
    """Take the steps that this machine has the parts for; ``on_step(title, number, of)``."""
    taken = [step for step in steps if setting.hardware.has_gpu or not step.on_gpu]
    found: dict[str, Any] = {"num_threads": setting.num_threads}
    for number, step in enumerate(taken, start=1):
        on_step(step.title, number, len(taken))
        found |= step.measure(setting)
        if setting.hardware.has_gpu:
            _give_back_vram()
    return MachineRates(**found)


def _give_back_vram() -> None:
    import torch

    torch.cuda.empty_cache()


def machine_steps() -> tuple[Step, ...]:
    """What a whole calibration consists of."""
    return (
        Step("memory, PCIe and products", _peaks),
        Step("CPU experts", expert_times),
        Step("calls of torch", _calls),
        Step("the GPU reading host memory", _pulls, on_gpu=True),
        Step("starting kernels", _launches, on_gpu=True),
        Step("handing over to the CPU", _hand_over, on_gpu=True),
        Step("sharing experts with the GPU", _shared, on_gpu=True),
        Step("the disk", _disk),
    )


def kernels_to_compile() -> list[str]:
    """What a calibration runs on the CPU and has yet to compile, for :func:`precompile`.

    To be compiled before anything is measured, which it would disturb.
    """
    return uncached([*("/".join(kernel) for kernel in KERNELS), WORKERS, READ, TOUCH, PACK])


def wake_gpu(hardware: Hardware) -> None:
    """The first use of a GPU, if there is one: its libraries, and compilation of its kernels.

    That takes ten seconds and more which need no quiet machine.
    """
    if hardware.has_gpu:
        from offload.compile_ahead import compile_ahead
        from offload.gpu_rates import launch_s

        launch_s()
        compile_ahead(hardware.ram_available_bytes)


def expert_times(setting: Setting) -> dict[str, Any]:
    """Of every kernel and size that there is memory for."""
    wanted = max(LEAST_ARENA, min(MAX_BYTES, CACHES * read_cache_bytes()))
    room = min(wanted, setting.hardware.ram_available_bytes // 3)
    arena = Arena(room)
    times = []
    with ExpertPool(setting.num_threads) as pool:
        for kind, activations in KERNELS:
            for size in SIZES:
                found = _times(pool, arena, room, size, kind, activations)
                times += [found] if found is not None else []
    return {"times": tuple(times)}


def _times(
    pool: ExpertPool, arena: Arena, room: int, size: Size, kind: str, activations: Activations
) -> ExpertTimes | None:
    weights = parse_kind(kind)
    expert_bytes = sample_bytes(weights, size.hidden, size.width)
    num_experts = room // expert_bytes // size.routed * size.routed
    if num_experts < size.routed:
        return None
    experts, _ = sample_experts(arena, weights, size.hidden, size.width, num_experts)
    table = measure_times(
        pool,
        experts,
        activations,
        tokens=size.tokens(pool.num_threads),
        routed=size.routed,
        budget_s=size.budget_s,
    )
    return ExpertTimes(expert_bytes=expert_bytes, table=table)


def _peaks(setting: Setting) -> dict[str, Any]:
    peaks = measure_peaks(setting.hardware, num_threads=setting.num_threads, dtype=setting.dtype)
    return {"peaks": peaks}


def _calls(setting: Setting) -> dict[str, Any]:
    """Calls of torch from Python, small and large, on the CPU."""
    import torch

    x = torch.ones(16)

    def call_often() -> None:
        for _ in range(CALLS):
            x.add_(1)

    return {
        "call_s": fastest_s(call_often) / CALLS,
        "cpu_tflops": gemm_flops("cpu", CPU_ROWS, "float32") / TERA,
        "row_gbps": row_bytes_per_s() / GIGA,
    }


def _pulls(setting: Setting) -> dict[str, Any]:
    from offload.gpu_rates import pull_rates

    return pull_rates(setting.hardware.ram_available_bytes, setting.num_threads)


def _launches(setting: Setting) -> dict[str, Any]:
    from offload.gpu_rates import launch_s, python_launch_s

    return {"launch_s": launch_s(), "python_launch_s": python_launch_s()}


def _hand_over(setting: Setting) -> dict[str, Any]:
    from offload.gpu_rates import hand_over_s

    return {"hand_over_s": hand_over_s(setting.num_threads)}


def _shared(setting: Setting) -> dict[str, Any]:
    from offload.share_rates import share_rates

    return {"shared": share_rates(setting.num_threads, setting.hardware.ram_available_bytes)}


def _disk(setting: Setting) -> dict[str, Any]:
    return {"disk_gbps": disk_gbps(setting.folder)}


def disk_gbps(folder: Path) -> float:
    """How fast a file in ``folder`` that is not in the page cache is read; 0: none can be made.

    :func:`why_no_disk` tells why.
    """
    import os

    block = memoryview(os.urandom(DISK_BLOCK))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(DISK_BYTES // DISK_BLOCK):
                file.write(block)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            room = bytearray(DISK_BLOCK)
            started = time.perf_counter()
            while file.readinto(room):
                pass
            return DISK_BYTES / (time.perf_counter() - started) / GIGA
    except OSError:
        return 0.0


def why_no_disk(folder: Path) -> str:
    """Why no file for :func:`disk_gbps` could be made: an empty one needs no room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno not in NO_ROOM:
            return f"not measured, {folder} cannot be written: {error.strerror}"
    return "no room to measure it"

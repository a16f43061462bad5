"""The CPU workers that a model starts with, their kernels compiled."""

import logging
import os
from typing import Any

from cpu_kernels.compiled import needs_compile
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.kernel_paths import PATHS, path_number
from cpu_kernels.precompile import WORKERS, precompile, uncached
from cpu_kernels.thread_count import measured_num_threads
from fiddler.config import EngineConfig
from fiddler.errors import ConfigError
from fiddler.loading.model_files import Progress
from fiddler.models.dtypes import Dtypes
from offload.executor import needs_warm_up, warm_up
from offload.handoff import pinned_words
from offload.handoff_probe import Way
from offload.plan import GpuSide, Plan

_log = logging.getLogger("fiddler.loading")

FED_BY_HOST = (None, "eager")  # ways to hand work to the pool


def start_pool(
    settings: EngineConfig,
    plan: Plan,
    dtypes: Dtypes,
    way: Way | None,
    on_progress: Progress | None,
) -> ExpertPool:
    """Workers with compiled kernels, before the weights are read: who waits sees what for."""
    cores = os.cpu_count() or 1
    if settings.cpu_threads is not None and settings.cpu_threads > cores:
        raise ConfigError(
            f"{settings.cpu_threads} CPU threads were asked for, but there are {cores} cores",
            hint="waiting threads spin: more than cores only slow each other down",
        )
    kinds = dtypes.expert_kinds
    has_cold = plan.memory.cpu_experts > 0
    # what hidden states are rounded to: in steps of few tokens, and of many beside a GPU
    kernels: list[tuple[Any, ...]] = [(kind, dtypes.few) for kind in kinds] if has_cold else []
    if has_cold and plan.gpu_side is GpuSide.CUDA:
        kernels += [(kind, dtypes.many) for kind in kinds]
    compiles = needs_compile() or any(needs_warm_up(*which) for which in kernels)
    report = on_progress if on_progress is not None and compiles else _no_progress
    if on_progress is None and compiles:
        _log.warning("compiling CPU kernels for this machine, which takes some 15 s")
    report("compiling CPU kernels, once", 0, 1)
    missing = uncached([WORKERS, *(PATHS[path_number(*which)].name for which in kernels)])
    if len(missing) > 1:  # one is compiled as soon in this process
        precompile(missing)
    fed_by_gpu = {"words": pinned_words(), "caller_works": False} if way not in FED_BY_HOST else {}
    pool = ExpertPool(settings.cpu_threads or measured_num_threads(), **fed_by_gpu)
    for which in kernels:
        warm_up(pool, *which)
    report("compiling CPU kernels, once", 1, 1)
    return pool


def _no_progress(what: str, done: int, total: int) -> None:
    """For who does not watch."""

"""Compiles kernels in several processes at once; the others find them in Numba's cache.

One process compiles the eight kernels of a calibration and the workers in 46 s, two on two cores in
29. Threads would not do: Numba compiles under one lock. Kernels have the names of their paths.

``python -m cpu_kernels.precompile workers bf16/f32`` is such a process, of up to 400 MB.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from cpu_kernels.compiled import (
    cache_folder,
    kernels,
    needs_compile,
    stage_address,
    stage_needs_compile,
)
from cpu_kernels.expert_layer import stage_maker
from cpu_kernels.kernel_paths import PATHS
from cpu_kernels.topology import num_cores, read_machine

WORKERS = "workers"  # the name of what every job needs
NUMBERS = {path.name: number for number, path in enumerate(PATHS)}


def uncached(names: Iterable[str]) -> list[str]:
    """Those that have to be compiled; none where no cache can be written: nothing would be kept."""
    if cache_folder(needs_compile) is None:
        return []
    return [name for name in names if _needs_compile(name)]


def precompile(names: Sequence[str]) -> None:
    """Compile in processes of their own, at most one for each core, until all have ended.

    What fails there is compiled, or complains, where it is used. An interrupt ends them all.
    """
    count = min(len(names), num_cores(read_machine()))
    with contextlib.ExitStack() as running:
        children = []
        for first in range(count):
            try:
                child = running.enter_context(_started(names[first::count]))
            except OSError:
                break
            running.callback(child.kill)  # before it is waited for
            children.append(child)
        for child in children:
            child.wait()


def compile_here(names: Iterable[str]) -> None:
    """Compile in this process, one after the other."""
    for name in names:
        if name == WORKERS:
            kernels()
        else:
            stage_address(*_stage(name))


def _needs_compile(name: str) -> bool:
    return needs_compile() if name == WORKERS else stage_needs_compile(*_stage(name))


def _stage(name: str) -> tuple[Any, int]:
    """What makes a path's stage, and its key."""
    number = NUMBERS[name]
    return stage_maker(PATHS[number]), number


def _started(names: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process that imports from where this one does, and never from the current folder (-P)."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "cpu_kernels.precompile", *names],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    compile_here(sys.argv[1:])

"""Compiles kernels in several processes at once; the others find them in Numba's cache.

One process compiles the eight kernels of a calibration and the workers in 46 s, two on two cores in
29. Threads would not do: Numba compiles under one lock. Kernels have the names of their paths.

``python -m cpu_kernels.precompile workers bf16/f32`` is such a process, of up to 400 MB.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from cpu_kernels.compiled import (
    cache_folder,
    entry,
    entry_needs_compile,
    kernels,
    needs_compile,
    stage_address,
    stage_needs_compile,
)
from cpu_kernels.expert_layer import stage_maker
from cpu_kernels.kernel_paths import PATHS
from cpu_kernels.lossless import PACKER, make_packer
from cpu_kernels.read_kernel import make_read_stage, make_touch_stage
from cpu_kernels.topology import num_cores, read_machine

WORKERS = "workers"  # the name of what every job needs
READ, TOUCH = "read", "touch"  # of jobs that measure memory
PACK = "pack bf12"
NUMBERS = {path.name: number for number, path in enumerate(PATHS)}


@dataclass(frozen=True, slots=True)
class _Code:
    """What has a name: whether it ``needs`` to be compiled, and what compiles it."""

    needs: Callable[[], bool]
    compile: Callable[[], object]

    @classmethod
    def stage(cls, make: Callable[..., Callable[..., None]], *key: int) -> "_Code":
        return cls(partial(stage_needs_compile, make, *key), partial(stage_address, make, *key))


OTHERS = {
    WORKERS: _Code(needs_compile, kernels),
    READ: _Code.stage(make_read_stage),
    TOUCH: _Code.stage(make_touch_stage),
    PACK: _Code(partial(entry_needs_compile, make_packer), partial(entry, make_packer, PACKER)),
}


def uncached(names: Iterable[str]) -> list[str]:
    """Those that have to be compiled; none where no cache can be written: nothing would be kept."""
    if cache_folder(needs_compile) is None:
        return []
    return [name for name in names if _code(name).needs()]


def precompile(names: Sequence[str]) -> None:
    """Compile in processes of their own, at most one for each core, until all have ended.

    What fails there is compiled, or complains, where it is used. An interrupt ends them all.
    """
    with precompiling(names):
        pass


@contextlib.contextmanager
def precompiling(names: Sequence[str]) -> Iterator[None]:
    """As :func:`precompile`, while this process does something else; an error in it ends them."""
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
        yield
        for child in children:
            child.wait()


def compile_here(names: Iterable[str]) -> None:
    """Compile in this process, one after the other."""
    for name in names:
        _code(name).compile()


def _code(name: str) -> _Code:
    if name in OTHERS:
        return OTHERS[name]
    number = NUMBERS[name]
    return _Code.stage(stage_maker(PATHS[number]), number)


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

"""Which vector instructions this CPU has, as LLVM sees it; the kernels' tiles follow from it."""

import functools
import platform
from dataclasses import dataclass

import llvmlite.binding as llvm

# Our name -> LLVM's name, widest use first.
LLVM_NAMES = {
    "amx_bf16": "amx-bf16",
    "avx512bf16": "avx512bf16",
    "avx512vnni": "avx512vnni",
    "avx512f": "avx512f",
    "avxvnni": "avxvnni",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """The extensions of one CPU. ``lanes`` is the number of float32 in its widest vector."""

    machine: str  # x86_64, aarch64, ...
    cpu: str  # LLVM's name of the core, e.g. znver4
    extensions: frozenset[str]  # of the keys of LLVM_NAMES

    @property
    def lanes(self) -> int:
        if "avx512f" in self.extensions:
            return 16
        return 8 if "avx2" in self.extensions else 4

    @property
    def is_x86(self) -> bool:
        return self.machine in ("x86_64", "amd64", "i686", "i386")

    def summary(self) -> str:
        """One line for people: the core, its extensions, the vector width in use."""
        names = " ".join(name for name in LLVM_NAMES if name in self.extensions) or "none"
        return f"{self.cpu}: {names}; kernels use {32 * self.lanes}-bit vectors"


def isa_from_features(machine: str, cpu: str, features: dict[str, bool]) -> Isa:
    """The :class:`Isa` of a CPU described in LLVM's words; unknown features are ignored."""
    found = frozenset(ours for ours, theirs in LLVM_NAMES.items() if features.get(theirs, False))
    return Isa(machine=machine.lower(), cpu=cpu, extensions=found)


@functools.cache
def host_isa() -> Isa:
    """The :class:`Isa` of the CPU we run on."""
    try:
        features = dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on this platform
        features = {}
    return isa_from_features(platform.machine(), llvm.get_host_cpu_name(), features)

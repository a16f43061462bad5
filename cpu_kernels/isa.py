"""Which vector instructions this CPU has, and which of them the kernels use.

``FIDDLER_ISA`` forces a smaller set: Numba then compiles for a CPU without the others, so that what
runs is what such a CPU would run. It is read when this module is imported first.
"""

import functools
import os
import platform
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from numba.core import config as numba_config

config: Any = numba_config  # its settings appear at run time

VARIABLE = "FIDDLER_ISA"

# Our name -> LLVM's name, widest use first.
LLVM_NAMES = {
    "amx_bf16": "amx-bf16",
    "avx512bf16": "avx512bf16",
    "avx512vnni": "avx512vnni",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512f": "avx512f",
    "avxvnni": "avxvnni",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
}

# What each path needs. A CPU with AVX-512 VNNI alone runs the avxvnni path too: on 256-bit vectors
# both have the same instructions.
LEVELS = ("plain", "avx2", "avxvnni", "avx512")
NEEDS: dict[str, tuple[frozenset[str], ...]] = {
    "plain": (frozenset(),),
    "avx2": (frozenset({"avx2", "fma", "f16c"}),),
    "avxvnni": (
        frozenset({"avx2", "fma", "f16c", "avxvnni"}),
        frozenset({"avx2", "fma", "f16c", "avx512vl", "avx512vnni"}),
    ),
    "avx512": (frozenset({"avx512f", "avx512bw", "avx512vl"}),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Isa:
    """The extensions that the kernels may use on one CPU, and the path that they take."""

    machine: str  # x86_64, aarch64, ...
    cpu: str  # LLVM's name of the core, e.g. znver4
    extensions: frozenset[str]  # of the keys of LLVM_NAMES
    level: str  # of LEVELS
    is_lesser: bool = False  # FIDDLER_ISA takes something from this CPU

    @property
    def lanes(self) -> int:
        """Number of float32 in a vector of the kernels."""
        return {"avx512": 16, "avxvnni": 8, "avx2": 8, "plain": 4}[self.level]

    @property
    def has_vnni(self) -> bool:
        """Whether there is a product of four bytes at the width of ``lanes``."""
        if self.level == "avx512":
            return "avx512vnni" in self.extensions
        return self.level == "avxvnni"

    @property
    def has_bf16(self) -> bool:
        """Whether there is a product of two bf16 at the width of ``lanes``."""
        return self.level == "avx512" and "avx512bf16" in self.extensions

    @property
    def multiplies_pairs(self) -> bool:
        """Whether products of two bf16 are used: on AMD's cores.

        On Emerald Rapids they have half the rate of float32's: 16 tokens take an expert of
        4096 x 14336 15.1 ms instead of 9.4, and one token gains nothing, since memory is the limit.
        """
        return self.has_bf16 and self.cpu.startswith("znver")

    @property
    def is_x86(self) -> bool:
        return self.machine in ("x86_64", "amd64", "i686", "i386")

    def summary(self) -> str:
        """One line for people: the core, its extensions, the path and vector width in use."""
        names = " ".join(name for name in LLVM_NAMES if name in self.extensions) or "none"
        return f"{self.cpu}: {names}; kernels: {self.level}, {32 * self.lanes}-bit vectors"


def best_level(extensions: frozenset[str]) -> str:
    """The widest path that a CPU with these extensions can run."""
    runs = [n for n in LEVELS if any(needed <= extensions for needed in NEEDS[n])]
    return runs[-1]


def isa_from_features(
    machine: str, cpu: str, features: dict[str, bool], forced: str | None = None
) -> Isa:
    """The :class:`Isa` of a CPU described in LLVM's words; unknown features are ignored.

    ``forced`` is one of ``LEVELS``; ValueError if it is not or the CPU cannot run it.
    """
    found = frozenset(ours for ours, theirs in LLVM_NAMES.items() if features.get(theirs, False))
    if forced is None:
        return Isa(machine=machine.lower(), cpu=cpu, extensions=found, level=best_level(found))
    if forced not in LEVELS:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(LEVELS)}, not {forced!r}.")
    if not any(needed <= found for needed in NEEDS[forced]):
        raise ValueError(
            f"This CPU cannot run {VARIABLE}={forced}: its best path is {best_level(found)}."
        )
    dropped = dropped_prefixes(found, forced)
    kept = frozenset(name for name in found if not _has_prefix(LLVM_NAMES[name], dropped))
    is_lesser = any(has and _has_prefix(name, dropped) for name, has in features.items())
    return Isa(machine=machine.lower(), cpu=cpu, extensions=kept, level=forced, is_lesser=is_lesser)


def dropped_prefixes(found: frozenset[str], level: str) -> tuple[str, ...]:
    """How the names of the extensions begin, hyphens left out, that a forced path does not use."""
    if level == "avx512":
        return ()
    wide = ("avx512", "avx10", "amx")
    if level == "avxvnni":
        return wide if "avxvnni" in found else ("avx512bf16", "avx512fp16", "avx10", "amx")
    return (*wide, "avxvnni", "avxifma", "avxneconvert") if level == "avx2" else ("",)


def _has_prefix(llvm_name: str, prefixes: tuple[str, ...]) -> bool:
    return llvm_name.replace("-", "").startswith(prefixes)


def llvm_features(features: dict[str, bool], dropped: tuple[str, ...]) -> str:
    """LLVM's feature string for a CPU with ``features`` and without what begins as ``dropped``."""
    return ",".join(
        f"{'+' if has and not _has_prefix(name, dropped) else '-'}{name}"
        for name, has in sorted(features.items())
    )


def _host_features() -> dict[str, bool]:
    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM cannot tell on this platform
        return {}


@functools.cache
def host_isa() -> Isa:
    """The :class:`Isa` of the CPU we run on, or what ``FIDDLER_ISA`` leaves of it.

    ValueError if that names no path or one that this CPU cannot run.
    """
    forced = os.environ.get(VARIABLE) or None
    return isa_from_features(platform.machine(), llvm.get_host_cpu_name(), _host_features(), forced)


def _restrict_numba() -> None:
    """Let Numba compile for what ``FIDDLER_ISA`` leaves; must run before it compiles anything."""
    if not os.environ.get(VARIABLE):
        return
    isa, features = host_isa(), _host_features()
    found = isa_from_features(isa.machine, isa.cpu, features).extensions
    config.CPU_FEATURES = llvm_features(features, dropped_prefixes(found, isa.level))
    if isa.level == "plain":  # the baseline of the architecture: on x86-64 that is SSE2
        config.CPU_NAME, config.CPU_FEATURES = "x86-64" if isa.is_x86 else "generic", ""


_restrict_numba()

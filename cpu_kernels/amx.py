"""Whether this process may use AMX's tiles: Linux gives their registers to those who ask.

Asking is for good, for all threads, and happens when the kernels are imported.
"""

import ctypes
import functools
import sys

from cpu_kernels.isa import host_isa

ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # of x86-64; asm/prctl.h


@functools.cache
def may_use_tiles() -> bool:
    """True if the CPU multiplies tiles of bf16 and the system lets all threads of this process."""
    isa = host_isa()
    if sys.platform != "linux" or isa.level != "avx512" or "amx_bf16" not in isa.extensions:
        return False
    granted: int = ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)
    return granted == 0

"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Between two kernels of a stream that have little to do lie 1 to 2 us, in which the device drains and
fills again. From Hopper on the second may start once all programs of the first have, and waits for
its results by itself: what needs none of them, as weights, it reads meanwhile (CUDA programming
guide, "Programmatic Dependent Launch and Synchronization"). On one H200 chains of products of a row
with 2,048 x 2,048 numbers took 2.9 us each where they took 5.2, of which 2.0 are the bytes.

Ordering: every kernel that is launched so waits in each of its programs, before it reads what any
kernel may have written and before it writes anything: weights alone need no wait. Only so is all
that came before it done when it is. A kernel that is launched otherwise finds all of it done.
"""

from __future__ import annotations

import ctypes
import functools

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gpu_kernels.device import family

FAMILIES = ("sm90", "sm100", "sm120")
OLDEST_DRIVER = 12030  # from here on graphs keep what such launches wait for


def dependent(device: torch.device) -> dict[str, bool]:
    """Launch options and ``DEPENDENT`` of a kernel that starts early; nothing where none can."""
    if not can_depend(device):
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


def followed(device: torch.device) -> dict[str, bool]:
    """The same for a kernel that starts after several others, but lets the next one start early."""
    return {"DEPENDENT": can_depend(device)}


def can_depend(device: torch.device) -> bool:
    """Whether kernels may start early there."""
    is_known = family(device) in FAMILIES
    return is_known and (device.type != "cuda" or driver_version() >= OLDEST_DRIVER)


@functools.cache
def driver_version() -> int:
    """Of CUDA, the newest that the driver knows: 12040 for 12.4."""
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value if status == 0 else 0


@triton.jit
def let_next_start(DEPENDENT: triton.language.constexpr):
    """The next kernel may start once all programs of this one have come here or ended."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(DEPENDENT: triton.language.constexpr):
    """What the kernels before this one have written is there."""
    if DEPENDENT:
        gdc_wait()

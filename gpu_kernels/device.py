"""Which GPUs the kernels run on, and the family under which tuned configurations are kept.

Below compute capability 8.0 there are neither bf16 tensor cores nor asynchronous copies into shared
memory, which every kernel here counts on.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Inline PTX saves instructions where it is used; Triton's interpreter has none.
HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)

OLDEST = (8, 0)
FAMILIES = {
    OLDEST: "sm80",
    (8, 6): "sm86",
    (8, 9): "sm89",
    (9, 0): "sm90",
    (10, 0): "sm100",
    (12, 0): "sm120",
}
WITHOUT_CUDA = FAMILIES[OLDEST]  # what a CPU counts as: interpreting, or compiling ahead


class UnsupportedGpuError(RuntimeError):
    """The GPU is too old for these kernels."""


def require_supported(device: torch.device | str) -> None:
    """Raise UnsupportedGpuError if ``device`` is a CUDA device below compute capability 8.0."""
    family(device)


def family(device: torch.device | str) -> str:
    """Return the newest of ``FAMILIES`` that is not newer than ``device``, as ``"sm90"``.

    A device without CUDA (Triton's interpreter) counts as the oldest. Raises UnsupportedGpuError
    below compute capability 8.0.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return WITHOUT_CUDA
    return _cuda_family(torch.cuda.current_device() if device.index is None else device.index)


def family_of(capability: tuple[int, int]) -> str | None:
    """Return the family of a compute capability; None if it is too old."""
    not_newer = [known for known in FAMILIES if known <= capability]
    return FAMILIES[max(not_newer)] if not_newer else None


@functools.cache
def _cuda_family(index: int) -> str:
    capability = torch.cuda.get_device_capability(index)
    found = family_of(capability)
    if found is None:
        name = torch.cuda.get_device_name(index)
        have, need = (f"{major}.{minor}" for major, minor in (capability, OLDEST))
        raise UnsupportedGpuError(
            f"{name} has compute capability {have}, but {need} (Ampere) or newer is needed"
        )
    return found

"""Keeping torch within the VRAM budget, and saying how much of it was used."""

import gc
from collections.abc import Callable
from contextlib import ExitStack

import torch

from offload.hardware import Hardware
from offload.layout import MARGIN_FIXED_BYTES
from offload.plan import Plan

_shares: list[int] = []  # bytes, of the models that are open: torch's limit is the process's


def limit_vram(plan: Plan, hardware: Hardware, resources: ExitStack) -> None:
    """Make torch refuse to allocate beyond the budget.

    The CUDA context is not torch's own, nor is what late kernels add to it (the fixed margin).
    """
    if not hardware.has_gpu:
        return

    def apply() -> None:
        allowed = sum(_shares) / hardware.vram_total_bytes if _shares else 1.0
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed))

    def lift() -> None:
        _shares.remove(share)
        apply()

    share = plan.vram_budget_bytes - plan.memory.context - MARGIN_FIXED_BYTES
    torch.cuda.reset_peak_memory_stats()
    _shares.append(share)
    resources.callback(lift)
    apply()


def vram_meter(plan: Plan, device: torch.device) -> Callable[[], int]:
    """Peak VRAM so far: torch's pool and the CUDA context as it was when the model was planned."""
    if device.type == "cpu":
        return lambda: 0
    return lambda: torch.cuda.max_memory_reserved() + plan.memory.context


def give_back_memory(device: torch.device) -> None:
    gc.unfreeze()  # who froze the heap did so for this model's tokens
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned pages; torch has no public name for it

"""Slots of all layers in one block of device memory.

An allocator rounds each large block up to 2 MiB; of 48 layers with two blocks each that would be
100 MiB, which experts can have.
"""

import math

import torch

ALIGNMENT = 256  # bytes; the kernels want 16, and other blocks of torch begin at multiples of 512


class SlotRoom:
    """Gives out parts of one block, one behind the other."""

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        """``sizes``: bytes of all that will be taken."""
        total = sum(map(_aligned, sizes))
        self._bytes = torch.empty(total, dtype=torch.uint8, device=device)
        self._taken = 0

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """The next part, uninitialised and contiguous."""
        num_bytes = math.prod(shape) * dtype.itemsize
        part = self._bytes[self._taken : self._taken + num_bytes]
        assert len(part) == num_bytes, "more is taken than was asked for"
        self._taken += _aligned(num_bytes)
        return part.view(dtype).view(shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT

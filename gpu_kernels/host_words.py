"""Words of mapped host memory by which kernels and the host tell each other a number: data only.

The kernels are in :mod:`gpu_kernels.bell`; this is for those who run without Triton too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Bell:
    """``number`` in the lower half of ``word``, int64 ``[1]`` in mapped host memory."""

    word: Tensor
    number: int

    def check(self) -> None:
        """Assert what kernels rely on."""
        assert (self.word.shape, self.word.dtype) == ((1,), torch.int64)


@dataclass(frozen=True, slots=True)
class Ring:
    """What the kernel that publishes work stores behind it: 0 to ``clear``, then ``bell``.

    ``clear`` is a word as a bell's. ``bell`` None: the stream rings. ``num_done`` (int32 ``[1]`` on
    the device) is 0 between launches: each leaves it so.
    """

    clear: Tensor
    bell: Bell | None = None
    num_done: Tensor | None = None

    def check(self, device: torch.device) -> None:
        """Assert what kernels on ``device`` rely on."""
        Bell(self.clear, 0).check()
        assert (self.bell is None) == (self.num_done is None)
        if self.bell is not None and self.num_done is not None:
            self.bell.check()
            assert (self.num_done.shape, self.num_done.dtype) == ((1,), torch.int32)
            assert self.num_done.device == device

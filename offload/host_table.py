"""A matrix in host memory of which a GPU's kernels read single rows: the input embedding.

A token reads one row of it, some kilobytes; in VRAM it would take the place of as many experts.
V rows, H numbers each.
"""

import numpy as np
import torch

from cpu_kernels.arena import Arena
from fiddler.errors import OutOfMemoryError
from offload.cuda_driver import DriverError
from offload.pinning import PinnedMemory
from offload.units import size_text


class HostTable:
    """Room for ``num_rows`` rows ``rows_VH`` of ``width`` numbers.

    Ordering: written, then pinned; kernels may read it until it is released.
    """

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        num_bytes = num_rows * width * dtype.itemsize
        self._arena = Arena(num_bytes)
        room = torch.from_numpy(self._arena.array(np.uint8, (num_bytes,)))
        self.rows_VH = room.view(dtype).view(num_rows, width)
        self._pinned = PinnedMemory(self)

    def pin(self) -> None:
        """Let kernels read it. OutOfMemoryError if the driver refuses."""
        try:
            self._pinned.pin(self._arena.address, self.rows_VH.nbytes)
        except DriverError as error:
            raise OutOfMemoryError(
                f"the driver does not pin {size_text(self.rows_VH.nbytes)} of host memory for the "
                f"input embedding: {error}",
                hint="free some memory, raise the limit on locked memory (ulimit -l), or use "
                "--device cpu",
            ) from error

    def release(self) -> None:
        """Nobody reads it any more."""
        self._pinned.release()

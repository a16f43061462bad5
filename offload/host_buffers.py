"""What one layer's step brings to the CPU pool and takes back: four buffers in host memory.

Shapes: T tokens, K top-k, H hidden.
"""

from dataclasses import dataclass

import numpy as np
import torch

MAX_KEPT = 64  # numbers of tokens; decode steps are of a few, prompts of any


@dataclass(frozen=True, slots=True)
class HostRows:
    """The first T rows of each buffer; ``arrays`` are the same four as the pool takes them."""

    x_TH: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    out_TH: torch.Tensor
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class HostBuffers:
    """Room for ``max_tokens``; pinned, if a GPU is to copy from and to it."""

    def __init__(self, max_tokens: int, hidden_size: int, top_k: int, *, pin: bool) -> None:
        self._buffers = tuple(
            torch.empty(max_tokens, columns, dtype=dtype, pin_memory=pin)
            for columns, dtype in (
                (hidden_size, torch.float32),
                (top_k, torch.int32),
                (top_k, torch.float32),
                (hidden_size, torch.float32),
            )
        )
        self._rows: dict[int, HostRows] = {}

    def rows(self, num_tokens: int) -> HostRows:
        """The same objects whenever they are still known: the pool checks new arrays only."""
        rows = self._rows.get(num_tokens)
        if rows is None:
            if len(self._rows) == MAX_KEPT:
                self._rows.clear()
            x_TH, ids_TK, weights_TK, out_TH = (buffer[:num_tokens] for buffer in self._buffers)
            arrays = x_TH.numpy(), ids_TK.numpy(), weights_TK.numpy(), out_TH.numpy()
            rows = HostRows(x_TH, ids_TK, weights_TK, out_TH, arrays)
            self._rows[num_tokens] = rows
        return rows

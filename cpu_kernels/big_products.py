"""The products of experts with many tokens: what every way to compute them has in common.

S choices of a token, Q rows of the pairs taken, H hidden, I expert width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cpu_kernels.activations import ACTIVATIONS
from cpu_kernels.big_expert_rows import row_kernels
from cpu_kernels.big_experts import BigExperts, Piece

if TYPE_CHECKING:
    from cpu_kernels.expert_layer import ExpertLayer

Room = Callable[[str, int], npt.NDArray[np.uint8]]  # (name, bytes): scratch, 64 bytes to spare
LINE = 64  # bytes of a cache line


class BigProducts(ABC):
    """One layer's, of the experts of a step. x, act and down are as its weights: bf16 or float32.

    It must not refer to the pool: a dropped pool could not end its threads.
    """

    def __init__(self, layer: ExpertLayer, num_workers: int) -> None:
        mlp = layer.experts.mlp
        self.experts = layer.experts
        self.is_bf16 = layer.path.kind.codes == "bf16"
        self.size = 2 if self.is_bf16 else 4
        self.activation = (ACTIVATIONS.index(mlp.activation), mlp.limit, mlp.alpha)
        self.kernels = row_kernels()
        self._num_workers = num_workers

    def bind(self, big: BigExperts, record: npt.NDArray[np.void], room: Room) -> None:
        """The next step's experts, and the record of its job; says where x, act and so on lie."""
        self.big, experts = big, self.experts
        # Numbers, since a look into a record takes Python 0.5 us.
        self.x_TH, self._out_TH, self.b13, self._b2 = (
            int(record[name][0]) for name in ("x", "out", "b13", "b2")
        )
        most_rows = max(end - start for start, end in zip(big.starts, big.starts[1:], strict=False))
        self.products_bytes = -(-self._products_bytes(most_rows) // LINE) * LINE
        rows = big.starts[-1] * self.size
        sizes = {
            "big_x": rows * experts.hidden,
            "big_act": rows * experts.width,
            "big_down": rows * experts.hidden,
            "big_products": self._num_workers * self.products_bytes,
        }
        self._scratch = [room(name, num_bytes) for name, num_bytes in sizes.items()]
        self.x, self.act, self.rows_down, self.products = (
            -(-array.ctypes.data // LINE) * LINE for array in self._scratch
        )
        self.sizes = tuple(sizes.values())

    @abstractmethod
    def padded_rows(self, count: int) -> int:
        """Rows for ``count`` tokens of an expert, a multiple of LEAST_ROWS."""

    @abstractmethod
    def _products_bytes(self, most_rows: int) -> int:
        """Of a worker, for experts of so many rows of pairs."""

    def as_worker(self, *, is_caller: bool) -> AbstractContextManager[None]:
        """In it a thread makes the calls below; ``is_caller``: it is not one of the pool's."""
        return self._without_denormals() if is_caller else nullcontext()

    @contextmanager
    def _without_denormals(self) -> Iterator[None]:
        modes = self.kernels.flush_denormals()
        try:
            yield
        finally:
            self.kernels.set_modes(modes)

    @abstractmethod
    def gather(self, first: int, last: int) -> None:
        """Rows ``first`` to ``last`` of x, those of their tokens."""

    @abstractmethod
    def gate_up(self, piece: Piece, worker: int) -> None:
        """act of an expert's rows of the piece."""

    @abstractmethod
    def down(self, piece: Piece, worker: int) -> None:
        """Columns of down, an expert's rows of w2 of the piece."""

    def add_up(self, worker: int, num_workers: int) -> None:
        """out += weight * down for this worker's columns, expert by expert."""
        big, hidden = self.big, self.experts.hidden
        first, last = (hidden * w // num_workers for w in (worker, worker + 1))
        for place, count, start in zip(big.places, big.counts, big.starts, strict=False):
            self.kernels.add_up(
                self.is_bf16,
                self.rows_down + start * hidden * self.size,
                *(big.token_Q[start:].ctypes.data, big.weight_Q[start:].ctypes.data, count),
                self._b2 + 4 * place * hidden if self._b2 else 0,
                *(hidden, first, last, self._out_TH),
            )

"""A few tokens times the dense layers' matrices, beside torch's product and a plain read.

A CUDA graph goes through as many matrices as no L2 holds, as a decode step does, one after the
other: all of them wait for memory, so what starts early gains least here.

Run: PYTHONPATH=. python -m scripts.bench.kernels.few_rows
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_kernels.few_rows import few_rows_linear
from scripts.bench.kernels.timing import graph_ms, read_ms
from scripts.bench.rows import Row, at_least, table

DEVICE = "cuda"
MOST_BYTES = 400 << 20
SHAPES = {
    "Qwen3-30B qkv": (5120, 2048),
    "Qwen3-30B o": (2048, 4096),
    "Mixtral qkv": (6144, 4096),
    "Mixtral o": (4096, 4096),
}
TOKENS = (1, 2)
LEAST = 1.0  # of torch's speed

Linear = Callable[[Tensor, Tensor], Tensor]


class Case:
    """A token or a few, and many matrices of a shape."""

    def __init__(self, num_tokens: int, rows: int, depth: int) -> None:
        half = {"dtype": torch.bfloat16, "device": DEVICE}
        count = MOST_BYTES // (2 * rows * depth)
        self.x_TK = torch.randn(num_tokens, depth, **half)  # type: ignore[call-overload]
        self.weights = [torch.randn(rows, depth, **half) for _ in range(count)]  # type: ignore[call-overload]

    def us(self, linear: Linear) -> float:
        """Microseconds of one product."""

        def run() -> None:
            for w_NK in self.weights:
                linear(self.x_TK, w_NK)

        return graph_ms(run) * 1e3 / len(self.weights)

    @property
    def read_us(self) -> float:
        """Of a plain read of a matrix, of all of them together."""
        num_bytes = self.weights[0].nbytes * len(self.weights)
        return read_ms(num_bytes) * 1e3 / len(self.weights)


def rows() -> list[Row]:
    """Every shape: speed beside torch's, and beside a read."""
    found = []
    for name, sizes in SHAPES.items():
        for num_tokens in TOKENS:
            case = Case(num_tokens, *sizes)
            ours, torchs, read = case.us(few_rows_linear), case.us(F.linear), case.read_us
            title = f"{name} {sizes[0]} x {sizes[1]}, {num_tokens} tokens"
            per_ms = [1e3 / us for us in (ours, torchs, read)]
            found += [
                at_least(
                    f"{title}, of torch's", per_ms[0], "1/ms", per_ms[1], torchs / ours, LEAST
                ),
                at_least(f"{title}, of a read", per_ms[0], "1/ms", per_ms[2], read / ours, 0.6),
            ]
    return found


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    print(table(rows()))

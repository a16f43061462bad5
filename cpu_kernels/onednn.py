"""Products of experts with many tokens by torch (oneDNN for bf16, MKL for f32).

The only module here that knows torch, imported only where it is used: for float32 weights, for bf16
ones whose sizes are no whole tiles, and where the CPU has AMX, whose own tiles are not measured.

Every product is one torch call of one worker with one thread: two workers are 1.9 times as fast as
one. Besides its arithmetic a layer takes some 0.3 ms, and each expert 0.1 ms, most of it with
Python's lock held, so small experts need many tokens.

The other way, torch's own threads in the caller while the workers sleep, was slower on 2 cores: ms
per expert of 2048 x 768 with 64 / 256 tokens, float32 38 / 60 against 13 / 34, bf16 57 / 59 against
28 / 58; and its threads spin on beside the workers.

With bf16 every product is rounded to bf16, as torch has no product of bf16 with a float32 result on
the CPU. Sums along k are torch's: steps repeat bit for bit, other machines may differ.

Q rows of the pairs taken, H hidden, I expert width.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.big_experts import BigExperts, Piece, padded_rows
from cpu_kernels.big_products import BigProducts, Room
from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import JOB_HEADER

if TYPE_CHECKING:
    from cpu_kernels.expert_layer import ExpertLayer

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class TorchProducts(BigProducts):
    """By one call of ``torch.mm`` for each piece of a matrix."""

    def __init__(self, layer: "ExpertLayer", workers: WorkerPool) -> None:
        super().__init__(layer, workers.num_threads)
        experts = layer.experts
        self._dtype = DTYPES[layer.path.kind.codes]
        self._w13 = self._tensor(experts.w13, experts.num_experts * experts.w13_stride)
        self._w2 = self._tensor(experts.w2, experts.num_experts * experts.w2_stride)
        use_one_thread_each(workers)

    def padded_rows(self, count: int) -> int:
        return padded_rows(count)

    def _products_bytes(self, most_rows: int) -> int:
        return 2 * most_rows * self.experts.width * self.size

    def bind(self, big: BigExperts, record: npt.NDArray[np.void], room: Room) -> None:
        super().bind(big, record, room)
        places = (self.x, self.act, self.rows_down, self.products)
        self._x, self._act, self._rows_down, self._products = (
            self._tensor(at, num_bytes) for at, num_bytes in zip(places, self.sizes, strict=True)
        )

    def _tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """The memory there in one dimension; somebody else keeps it alive."""
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=self._dtype)

    @contextmanager
    def as_worker(self, *, is_caller: bool) -> Iterator[None]:
        """In torch's inference mode, and with one thread for torch.

        The mode is the thread's own: who is in it when it submits has made tensors that only code
        in it may write.
        """
        one_thread = _one_thread() if is_caller else nullcontext()
        with torch.inference_mode(), super().as_worker(is_caller=is_caller), one_thread:
            yield

    def gather(self, first: int, last: int) -> None:
        tokens, hidden = self.big.token_Q.ctypes.data, self.experts.hidden
        self.kernels.gather(self.is_bf16, self.x_TH, tokens, first, last, hidden, self.x)

    def gate_up(self, piece: Piece, worker: int) -> None:
        big, experts = self.big, self.experts
        hidden, width, size = experts.hidden, experts.width, self.size
        (n, first, last), start = piece, big.starts[piece.n]
        num_rows, num_cols = big.starts[n + 1] - start, last - first
        x = self._x.as_strided((num_rows, hidden), (hidden, 1), start * hidden)
        at = worker * self.products_bytes // size
        for half in range(2):
            row = (2 * big.places[n] + half) * width + first
            w = self._w13.as_strided((hidden, num_cols), (1, hidden), row * hidden)
            place = at + half * num_rows * num_cols
            products = self._products.as_strided((num_rows, num_cols), (num_cols, 1), place)
            torch.mm(x, w, out=products)
        bias = self.b13 + 4 * (2 * big.places[n] * width + first) if self.b13 else 0
        gate = self.products + worker * self.products_bytes
        self.kernels.activate(
            *(self.is_bf16, *self.activation, bias),
            *(width, gate, gate + num_rows * num_cols * size, num_rows, num_cols),
            *(self.act + (start * width + first) * size, width * size),
        )

    def down(self, piece: Piece, worker: int) -> None:
        big, experts = self.big, self.experts
        hidden, width = experts.hidden, experts.width
        (n, first, last), start = piece, big.starts[piece.n]
        num_rows, num_cols = big.starts[n + 1] - start, last - first
        act = self._act.as_strided((num_rows, width), (width, 1), start * width)
        row = big.places[n] * hidden + first
        w = self._w2.as_strided((width, num_cols), (1, width), row * width)
        place = start * hidden + first
        torch.mm(act, w, out=self._rows_down.as_strided((num_rows, num_cols), (hidden, 1), place))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_one_thread_each(workers: WorkerPool) -> None:
    """From now on torch uses one thread in each worker, and as many as before elsewhere.

    OpenMP keeps the number per thread, but torch also gives the last one that any thread has set to
    threads that come later: so the caller sets its own once more.
    """

    def stage(phase: int, worker: int, num_workers: int) -> None:
        if worker > 0 or not caller_works:
            torch.set_num_threads(1)

    caller_works, before = workers.caller_works, torch.get_num_threads()
    number = workers.add_job(np.array([(0, 1)], JOB_HEADER), stage)
    try:
        workers.ring(number)
        workers.wait()
    finally:
        workers.remove_job(number)
        torch.set_num_threads(before)

"""Experts with many tokens, handed over to torch's matrix products (oneDNN for bf16, MKL for f32).

The only module here that knows torch, imported only where a layer hands over.

One Python job does a whole layer: first the compiled phases for the other experts, then four more:
rows of x gathered by expert; act = f(gate, up) by pieces of rows of w13; down by pieces of rows of
w2; out += weight * down, by columns. Every product is one torch call of one worker with one thread:
two workers are 1.9 times as fast as one. Besides its arithmetic a layer takes some 0.3 ms, and each
expert 0.1 ms, most of it with Python's lock held, so small experts need many tokens.

The other way, torch's own threads in the caller while the workers sleep, was slower on 2 cores: ms
per expert of 2048 x 768 with 64 / 256 tokens, float32 38 / 60 against 13 / 34, bf16 57 / 59 against
28 / 58; and its threads spin on beside the workers.

With bf16 every product is rounded to bf16, as torch has no product of bf16 with a float32 result on
the CPU. Sums along k are torch's: steps repeat bit for bit, other machines may differ.

T tokens, S choices of a token, Q rows of the pairs taken, H hidden, I expert width.
"""

import ctypes
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels.activations import ACTIVATIONS
from cpu_kernels.big_expert_rows import row_kernels
from cpu_kernels.big_experts import BigExperts, Piece, may_hand_over, share_rows, take_big
from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import ERROR, JOB_HEADER

if TYPE_CHECKING:
    from cpu_kernels.expert_layer import ExpertLayer

Room = Callable[[str, int], npt.NDArray[np.uint8]]  # (name, bytes): scratch, 64 bytes to spare
LINE = 64  # bytes of a cache line
NUM_PHASES = 4
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


class HandOver:
    """The second way of one layer: its job, and what a step gives to torch.

    Ordering: as its layer. It must not refer to the pool: a dropped pool could not end its threads.
    """

    def __init__(self, workers: WorkerPool, layer: "ExpertLayer", least: int) -> None:
        """Take experts with ``least`` tokens and more; ValueError where that is not possible."""
        experts, kind = layer.experts, layer.path.kind
        if not may_hand_over(layer.path):
            raise ValueError(
                f"{layer.path.name} experts cannot be handed over: choose bf16 weights with bf16 "
                "activations, or f32 weights"
            )
        if least < 1:
            raise ValueError(f"hand_over must be at least 1 token, not {least}")
        self._layer, self._least = layer, least
        self._is_bf16 = kind.codes == "bf16"
        self._dtype = DTYPES[kind.codes]
        self._size = self._dtype.itemsize
        self._w13 = self._tensor(experts.w13, experts.num_experts * experts.w13_stride)
        self._w2 = self._tensor(experts.w2, experts.num_experts * experts.w2_stride)
        mlp = experts.mlp
        self._activation = (ACTIVATIONS.index(mlp.activation), mlp.limit, mlp.alpha)
        self._kernels = row_kernels()
        self._words, self._caller_works = workers.words, workers.caller_works
        self._num_workers = workers.num_threads
        self._rest = layer.record.copy()  # the layer's job without the experts that are taken
        use_one_thread_each(workers)
        self._first_phase = int(layer.record["num_phases"][0])
        record = np.array([(0, self._first_phase + NUM_PHASES)], JOB_HEADER)
        self.number = workers.add_job(record, self._run)

    def take(self, room: Room) -> int:
        """Take the big experts out of the layer's bound step; returns the job to ring for it."""
        layer = self._layer
        _, ids_TS, weights_TS, _ = layer.step
        num_experts = layer.experts.num_experts
        big = take_big(ids_TS, weights_TS, layer.place_of, num_experts, self._least)
        if big is None:
            return layer.number
        self._big = big
        self._rest[:] = layer.record
        self._rest["ids"] = big.rest_TS.ctypes.data
        # Numbers, since a look into a record takes Python 0.5 us.
        self._x_TH, self._out_TH, self._b13, self._b2 = (
            int(self._rest[name][0]) for name in ("x", "out", "b13", "b2")
        )
        self._bind_scratch(big, room)
        self._gate_up = share_rows(big.starts, layer.experts.width, self._num_workers)
        self._down = share_rows(big.starts, layer.experts.hidden, self._num_workers)
        self._gate_up_turns = itertools.count(self._num_workers)
        self._down_turns = itertools.count(self._num_workers)
        return self.number

    def _bind_scratch(self, big: BigExperts, room: Room) -> None:
        experts = self._layer.experts
        most_rows = max(end - start for start, end in zip(big.starts, big.starts[1:], strict=False))
        self._products_bytes = -(-2 * most_rows * experts.width * self._size // LINE) * LINE
        rows = big.starts[-1] * self._size
        sizes = {
            "big_x": rows * experts.hidden,
            "big_act": rows * experts.width,
            "big_down": rows * experts.hidden,
            "big_products": self._num_workers * self._products_bytes,
        }
        self._scratch = [room(name, num_bytes) for name, num_bytes in sizes.items()]
        starts = [-(-array.ctypes.data // LINE) * LINE for array in self._scratch]
        self._x, self._act, self._rows_down, self._products = (
            self._tensor(at, num_bytes)
            for at, num_bytes in zip(starts, sizes.values(), strict=True)
        )

    def _tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        """The memory there in one dimension; somebody else keeps it alive."""
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=self._dtype)

    def _run(self, phase: int, worker: int, num_workers: int) -> None:
        """One worker's share of a phase.

        The mode is the thread's own: who is in it when it submits has made tensors that only code
        in it may write.
        """
        is_caller = self._caller_works and worker == 0
        with torch.inference_mode(), self._as_worker() if is_caller else nullcontext():
            self._run_share(phase, worker, num_workers)

    @contextmanager
    def _as_worker(self) -> Iterator[None]:
        """Within, the caller's thread is as a worker's: one thread for torch, no denormals."""
        before, modes = torch.get_num_threads(), self._kernels.flush_denormals()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            self._kernels.set_modes(modes)

    def _run_share(self, phase: int, worker: int, num_workers: int) -> None:
        record = self._rest
        if phase < self._first_phase:
            stage, job = int(record["stage"][0]), record.ctypes.data
            self._kernels.run_stage(stage, job, phase, worker, num_workers)
        elif self._words[ERROR]:  # an unknown id: out stays zeros
            return
        elif phase == self._first_phase:
            self._gather(worker, num_workers)
        elif phase == self._first_phase + 3:
            self._add_up(worker, num_workers)
        elif phase == self._first_phase + 1:
            for piece in self._pieces(self._gate_up, worker, self._gate_up_turns):
                self._gate_up_piece(piece, worker)
        else:
            for piece in self._pieces(self._down, worker, self._down_turns):
                self._down_piece(piece)

    def _pieces(
        self, shares: list[list[Piece]], worker: int, turns: Iterator[int]
    ) -> Iterator[Piece]:
        """A worker's own share, then those that nobody has taken."""
        while worker < len(shares):
            yield from shares[worker]
            worker = next(turns)  # under Python's lock: no two workers get one number

    def _gather(self, worker: int, num_workers: int) -> None:
        token_Q, hidden = self._big.token_Q, self._layer.experts.hidden
        first, last = (len(token_Q) * w // num_workers for w in (worker, worker + 1))
        tokens, rows = token_Q.ctypes.data, self._x.data_ptr()
        self._kernels.gather(self._is_bf16, self._x_TH, tokens, first, last, hidden, rows)

    def _gate_up_piece(self, piece: Piece, worker: int) -> None:
        """act[rows of the expert, columns of the piece]."""
        big, experts = self._big, self._layer.experts
        hidden, width, size = experts.hidden, experts.width, self._size
        (n, first, last), start = piece, big.starts[piece.n]
        num_rows, num_cols = big.starts[n + 1] - start, last - first
        x = self._x.as_strided((num_rows, hidden), (hidden, 1), start * hidden)
        at = worker * self._products_bytes // size
        for half in range(2):
            row = (2 * big.places[n] + half) * width + first
            w = self._w13.as_strided((hidden, num_cols), (1, hidden), row * hidden)
            place = at + half * num_rows * num_cols
            products = self._products.as_strided((num_rows, num_cols), (num_cols, 1), place)
            torch.mm(x, w, out=products)
        bias = self._b13 + 4 * (2 * big.places[n] * width + first) if self._b13 else 0
        gate = self._products.data_ptr() + worker * self._products_bytes
        self._kernels.activate(
            *(self._is_bf16, *self._activation, bias),
            *(width, gate, gate + num_rows * num_cols * size, num_rows, num_cols),
            *(self._act.data_ptr() + (start * width + first) * size, width * size),
        )

    def _down_piece(self, piece: Piece) -> None:
        """Rows of down, columns of the piece."""
        big, experts = self._big, self._layer.experts
        hidden, width = experts.hidden, experts.width
        (n, first, last), start = piece, big.starts[piece.n]
        num_rows, num_cols = big.starts[n + 1] - start, last - first
        act = self._act.as_strided((num_rows, width), (width, 1), start * width)
        row = big.places[n] * hidden + first
        w = self._w2.as_strided((width, num_cols), (1, width), row * width)
        place = start * hidden + first
        torch.mm(act, w, out=self._rows_down.as_strided((num_rows, num_cols), (hidden, 1), place))

    def _add_up(self, worker: int, num_workers: int) -> None:
        """out += weight * down for this worker's columns, expert by expert."""
        big, hidden = self._big, self._layer.experts.hidden
        first, last = (hidden * w // num_workers for w in (worker, worker + 1))
        for place, count, start in zip(big.places, big.counts, big.starts, strict=False):
            self._kernels.add_up(
                self._is_bf16,
                self._rows_down.data_ptr() + start * hidden * self._size,
                *(big.token_Q[start:].ctypes.data, big.weight_Q[start:].ctypes.data, count),
                self._b2 + 4 * place * hidden if self._b2 else 0,
                *(hidden, first, last, self._out_TH),
            )


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

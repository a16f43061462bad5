"""Experts with many tokens, handed over: tiles that read weights once for many tokens, or torch.

One Python job does a whole layer: first the compiled phases for the other experts, then four more:
rows of x gathered by expert; act = f(gate, up) by pieces of rows of w13; down by pieces of rows of
w2; out += weight * down, by columns.

T tokens, S choices of a token, Q rows of the pairs taken.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cpu_kernels.big_expert_columns import ColumnProducts, may_multiply
from cpu_kernels.big_expert_rows import row_kernels
from cpu_kernels.big_experts import Piece, may_hand_over, share_rows, take_big
from cpu_kernels.big_products import BigProducts, Room
from cpu_kernels.threads import WorkerPool
from cpu_kernels.worker import ERROR, JOB_HEADER

if TYPE_CHECKING:
    from cpu_kernels.expert_layer import ExpertLayer

NUM_PHASES = 4


class HandOver:
    """The second way of one layer: its job, and which experts of a step take it.

    Ordering: as its layer. It must not refer to the pool: a dropped pool could not end its threads.
    """

    def __init__(self, workers: WorkerPool, layer: "ExpertLayer", least: int) -> None:
        """Take experts with ``least`` tokens and more; ValueError where that is not possible."""
        if not may_hand_over(layer.path):
            raise ValueError(
                f"{layer.path.name} experts cannot be handed over: choose bf16 weights with bf16 "
                "activations, or f32 weights"
            )
        if least < 1:
            raise ValueError(f"hand_over must be at least 1 token, not {least}")
        self._layer, self._least = layer, least
        self._products = _products(workers, layer)
        self._run_stage = row_kernels().run_stage
        self._words, self._caller_works = workers.words, workers.caller_works
        self._num_workers = workers.num_threads
        self._rest = layer.record.copy()  # the layer's job without the experts that are taken
        self._first_phase = int(layer.record["num_phases"][0])
        record = np.array([(0, self._first_phase + NUM_PHASES)], JOB_HEADER)
        self.number = workers.add_job(record, self._run)

    def take(self, room: Room) -> int:
        """Take the big experts out of the layer's bound step; returns the job to ring for it."""
        layer = self._layer
        _, ids_TS, weights_TS, _ = layer.step
        num_experts = layer.experts.num_experts
        big = take_big(
            *(ids_TS, weights_TS, layer.place_of, num_experts),
            *(self._least, self._products.padded_rows),
        )
        if big is None:
            return layer.number
        self._rest[:] = layer.record
        self._rest["ids"] = big.rest_TS.ctypes.data
        self._products.bind(big, self._rest, room)
        self._num_rows = len(big.token_Q)
        self._gate_up = share_rows(big.starts, layer.experts.width, self._num_workers)
        self._down = share_rows(big.starts, layer.experts.hidden, self._num_workers)
        self._gate_up_turns = itertools.count(self._num_workers)
        self._down_turns = itertools.count(self._num_workers)
        return self.number

    def _run(self, phase: int, worker: int, num_workers: int) -> None:
        """One worker's share of a phase."""
        with self._products.as_worker(is_caller=self._caller_works and worker == 0):
            self._run_share(phase, worker, num_workers)

    def _run_share(self, phase: int, worker: int, num_workers: int) -> None:
        record, products = self._rest, self._products
        if phase < self._first_phase:
            stage, job = int(record["stage"][0]), record.ctypes.data
            self._run_stage(stage, job, phase, worker, num_workers)
        elif self._words[ERROR]:  # an unknown id: out stays zeros
            return
        elif phase == self._first_phase:
            products.gather(*(self._num_rows * w // num_workers for w in (worker, worker + 1)))
        elif phase == self._first_phase + 1:
            for piece in self._pieces(self._gate_up, worker, self._gate_up_turns):
                products.gate_up(piece, worker)
        elif phase == self._first_phase + 2:
            for piece in self._pieces(self._down, worker, self._down_turns):
                products.down(piece, worker)
        else:
            products.add_up(worker, num_workers)

    def _pieces(
        self, shares: list[list[Piece]], worker: int, turns: Iterator[int]
    ) -> Iterator[Piece]:
        """A worker's own share, then those that nobody has taken."""
        while worker < len(shares):
            yield from shares[worker]
            worker = next(turns)  # under Python's lock: no two workers get one number


def _products(workers: WorkerPool, layer: "ExpertLayer") -> BigProducts:
    if may_multiply(layer.path, layer.experts.hidden, layer.experts.width):
        return ColumnProducts(layer, workers.num_threads)
    from cpu_kernels.onednn import TorchProducts  # takes seconds to import

    return TorchProducts(layer, workers)

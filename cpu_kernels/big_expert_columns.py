"""The products of bf16 experts with many tokens, by tiles of weight rows and packed tokens.

Q rows of pairs, in blocks of 16; H hidden, I expert width, both multiples of 32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types

from cpu_kernels.activations import CHUNK, activate
from cpu_kernels.addresses import f32_array, i32_array, i64_array
from cpu_kernels.big_expert_rows import row_of
from cpu_kernels.big_experts import LEAST_ROWS, Piece, whole_blocks
from cpu_kernels.big_products import BigProducts
from cpu_kernels.column_tile import HAS_TILES, PAIR_BYTES, TOKENS
from cpu_kernels.columns import BLOCK_BYTES, bf16_pair, multiply_columns, pack_row
from cpu_kernels.compiled import compile_entry, stamped
from cpu_kernels.dense_stage import AS_BF16, store_row
from cpu_kernels.intrinsics import jit
from cpu_kernels.kernel_paths import KernelPath

if TYPE_CHECKING:
    from cpu_kernels.expert_layer import ExpertLayer

ROWS = 32  # of weights whose sums wait for their activation: a multiple of every tile's
# Of tokens, likewise. ms of a Mixtral expert with 512 tokens on two cores by 2 / 4 / 8 / 16 blocks:
# 192, 203, 208, 242; with 32 tokens: 18.7, 16.0, 18.3, 17.7.
BLOCKS = 4
PRODUCTS_BYTES = 2 * ROWS * BLOCKS * TOKENS * 4  # a worker's room for them, gate's and up's

assert CHUNK == TOKENS == LEAST_ROWS
_INT, _F32 = types.int64, types.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnKernels:
    """Compiled, without the GIL; what they are given are addresses, sizes and bytes of a row."""

    gather: Callable[..., None]
    gate_up: Callable[..., None]
    down: Callable[..., None]


def may_multiply(path: KernelPath, hidden: int, width: int) -> bool:
    """Whether these experts are whole tiles of bf16, on a CPU where this is the fastest way."""
    is_whole = hidden % ROWS == 0 and width % ROWS == 0
    return path.name == "bf16/bf16" and is_whole and not HAS_TILES


def gather(x, tokens, first, last, hidden, blocks):
    """Pack rows ``first`` to ``last``, x of their tokens, zeros where that is -1."""
    token = i64_array(tokens, last)
    zeros = np.zeros(hidden, np.float32)
    for q in range(first, last):
        block = blocks + q // TOKENS * hidden * BLOCK_BYTES
        pack_row(row_of(x, token[q], zeros), q % TOKENS, block)


@jit
def add_to_row(bias, index, row, num_tokens):
    if bias != 0:
        sums = f32_array(row, num_tokens)
        sums += f32_array(bias, index + 1)[index]


@jit
def pack_act(kind, limit, alpha, gate, up, row_bytes, num_blocks, act, act_block_bytes):
    """Two rows of act = f(gate, up), as the pairs of packed tokens."""
    both = np.empty((2, TOKENS), np.float32)
    for block in range(num_blocks):
        at = block * TOKENS * 4
        for half in range(2):
            of_row = at + half * row_bytes
            to = both[half].ctypes.data
            activate(kind, limit, alpha, gate + of_row, up + of_row, to)
        pairs = i32_array(act + block * act_block_bytes, TOKENS)
        for t in range(TOKENS):
            pairs[t] = bf16_pair(both[0, t], both[1, t])


def gate_up(w, first, last, hidden, width, x, num_blocks, kind, limit, alpha, bias, room, act):
    """act of one expert's rows ``first`` to ``last``; ``w`` is its first row of gate.

    ``x`` and ``act`` are its packed tokens; ``bias``: of gate, then of up; 0: none.
    """
    row_bytes, up_bias = 2 * hidden, bias + 4 * width if bias != 0 else 0
    up_w, up_room = w + width * row_bytes, room + PRODUCTS_BYTES // 2
    for row in range(first, last, ROWS):
        for block in range(0, num_blocks, BLOCKS):
            count = min(BLOCKS, num_blocks - block)
            out_bytes, tokens = count * TOKENS * 4, x + block * hidden * BLOCK_BYTES
            for from_w, to in ((w, room), (up_w, up_room)):
                rows = from_w + row * row_bytes
                multiply_columns(rows, row_bytes, ROWS, tokens, count, hidden, to, out_bytes)
            for r in range(ROWS):
                add_to_row(bias, row + r, room + r * out_bytes, count * TOKENS)
                add_to_row(up_bias, row + r, up_room + r * out_bytes, count * TOKENS)
            to = act + block * width * BLOCK_BYTES + row // 2 * PAIR_BYTES
            for r in range(0, ROWS, 2):
                g, u, pair = room + r * out_bytes, up_room + r * out_bytes, to + r // 2 * PAIR_BYTES
                pack_act(kind, limit, alpha, g, u, out_bytes, count, pair, width * BLOCK_BYTES)


def down(w, first, last, hidden, width, act, num_blocks, room, out):
    """Rows ``first`` to ``last`` of one expert's w2 times act, as columns of ``out``, bf16 [Q, H].

    ``w`` is its first row, ``act`` its packed tokens.
    """
    for row in range(first, last, ROWS):
        rows = w + row * 2 * width
        for block in range(0, num_blocks, BLOCKS):
            count = min(BLOCKS, num_blocks - block)
            tokens = act + block * width * BLOCK_BYTES
            multiply_columns(rows, 2 * width, ROWS, tokens, count, width, room, count * TOKENS * 4)
            sums = f32_array(room, ROWS * count * TOKENS).reshape(ROWS, count * TOKENS)
            for t in range(count * TOKENS):
                store_row(AS_BF16, sums[:, t], out + 2 * ((block * TOKENS + t) * hidden + row))


@functools.cache
def column_kernels() -> ColumnKernels:
    """The kernels; the first call on a machine compiles them."""

    def compiled(function: Callable[..., None], *signature: Any) -> Callable[..., None]:
        # a process that may not use tiles must not find them in the cache
        entry: Callable[..., None] = compile_entry(stamped(function, int(HAS_TILES)), signature)
        return entry

    return ColumnKernels(
        gather=compiled(gather, *(_INT,) * 6),
        gate_up=compiled(gate_up, *(_INT,) * 8, _F32, _F32, *(_INT,) * 3),
        down=compiled(down, *(_INT,) * 9),
    )


class ColumnProducts(BigProducts):
    """By compiled tiles, with no word of Python within a piece."""

    def __init__(self, layer: ExpertLayer, num_workers: int) -> None:
        super().__init__(layer, num_workers)
        self._columns = column_kernels()

    def padded_rows(self, count: int) -> int:
        return whole_blocks(count)

    def _products_bytes(self, most_rows: int) -> int:
        return PRODUCTS_BYTES

    def gather(self, first: int, last: int) -> None:
        tokens, hidden = self.big.token_Q.ctypes.data, self.experts.hidden
        self._columns.gather(self.x_TH, tokens, first, last, hidden, self.x)

    def gate_up(self, piece: Piece, worker: int) -> None:
        experts, (n, first, last) = self.experts, piece
        hidden, width = experts.hidden, experts.width
        place, start, num_blocks = self._expert(n)
        bias = self.b13 + 4 * 2 * place * width if self.b13 else 0
        self._columns.gate_up(
            *(experts.w13 + place * experts.w13_stride, first, last, hidden, width),
            *(self.x + start * 2 * hidden, num_blocks, *self.activation, bias),
            *(self._room(worker), self.act + start * 2 * width),
        )

    def down(self, piece: Piece, worker: int) -> None:
        experts, (n, first, last) = self.experts, piece
        hidden, width = experts.hidden, experts.width
        place, start, num_blocks = self._expert(n)
        self._columns.down(
            *(experts.w2 + place * experts.w2_stride, first, last, hidden, width),
            *(self.act + start * 2 * width, num_blocks),
            *(self._room(worker), self.rows_down + start * 2 * hidden),
        )

    def _expert(self, n: int) -> tuple[int, int, int]:
        """Its place, its first row of pairs, its blocks of them."""
        start, end = self.big.starts[n : n + 2]
        return self.big.places[n], start, (end - start) // TOKENS

    def _room(self, worker: int) -> int:
        return self.products + worker * self.products_bytes

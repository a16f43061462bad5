"""Products of experts by columns alone: TFLOP/s by how the depth, rows and tokens are cut.

    python -m scripts.bench.columns [--threads N] [--tokens 32,128,512] [--shapes mixtral-8x7b]
            [--depths 256,512,1024] [--rows 32,64,128] [--blocks 8,32]

Prints a table per shape and matrix and writes build/bench-columns.json. Each call takes the next
experts, so that weights come from memory; the tokens are packed already, and nothing is done with
the sums. A setting is elements of the depth, rows and blocks of tokens at a time; rows are those of
gate and as many of up, or twice as many of down. The setting in use should be close to the best.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from cpu_kernels import columns
from cpu_kernels.addresses import array_of_records
from cpu_kernels.arena import Arena
from cpu_kernels.column_panels import SUM_BLOCKS, SUM_ROWS, UNIT
from cpu_kernels.column_tile import SUM_BYTES, TOKENS
from cpu_kernels.columns import BLOCK_BYTES, DEPTH
from cpu_kernels.compiled import stage_address
from cpu_kernels.intrinsics import jit
from cpu_kernels.isa import host_isa
from cpu_kernels.pieces import GATE_UP, forget_pieces, num_rounds, pieces
from cpu_kernels.threads import WorkerPool
from cpu_kernels.weight_kind import parse_kind
from cpu_kernels.worker import JOB_HEADER, TAKEN
from scripts.bench.cpu_arena import SHAPES, Shape, fill_experts
from scripts.bench.rows import Row, at_least, table, write

LEAST_PART = 0.9  # of the best setting's rate, by the one in use
CALLS = 5
OUTPUT = Path("build/bench-columns.json")
FIELDS = (
    *("w", "stride", "row_bytes", "num_matrices", "num_rows", "apart", "num_runs"),
    *("x", "num_blocks", "depth", "sums", "sums_bytes", "rows", "blocks", "taken"),
)
PRODUCT_JOB = np.dtype([*JOB_HEADER, *((name, np.int64) for name in FIELDS)])
product_job = array_of_records(PRODUCT_JOB)


class Cut(NamedTuple):
    """A setting: elements of the depth, rows of each run, blocks of tokens."""

    depth: int
    rows: int
    blocks: int


class Matrices(NamedTuple):
    """Some experts' w13 or w2: where the first lies, and its sizes."""

    address: int
    stride: int
    num_rows: int  # of one run
    num_runs: int
    depth: int


IN_USE = Cut(DEPTH, SUM_ROWS, SUM_BLOCKS)


def make_product_stage(depth: int) -> Any:
    """Products of all matrices by parts of that depth, then a phase to end."""
    original = columns.multiply_columns.py_func
    cut = {**original.__globals__, "DEPTH": depth}
    multiply = jit(FunctionType(original.__code__, cut, original.__name__))

    def product_stage(job_address, phase, worker, num_workers):  # type: ignore[no-untyped-def]
        job = product_job(job_address, 1)[0]
        if phase > 0:
            forget_pieces(job.taken, GATE_UP, worker)
            return
        each = job.num_rows // UNIT
        total, sums = job.num_matrices * each, job.sums + worker * job.sums_bytes
        rounds = num_rounds(total * UNIT * job.num_runs * job.row_bytes, num_workers)
        for begin, end in pieces(job.taken, GATE_UP, total, rounds, worker, num_workers):
            unit = begin
            while unit < end:
                matrix, row = unit // each, unit % each * UNIT
                num_rows = min(job.rows, (end - unit) * UNIT, job.num_rows - row)
                w = job.w + matrix * job.stride + row * job.row_bytes
                for block in range(0, job.num_blocks, job.blocks):
                    x = job.x + block * job.depth * BLOCK_BYTES
                    count = min(job.blocks, job.num_blocks - block)
                    apart, runs, depth = job.apart, job.num_runs, job.depth
                    multiply(w, job.row_bytes, num_rows, apart, runs, x, count, depth, sums)
                unit += num_rows // UNIT

    return product_stage


class Products:
    """A pool's products of matrices, one set after the other."""

    def __init__(self, pool: WorkerPool, most_depth: int, most_tokens: int, most_rows: int) -> None:
        self._pool = pool
        blocks = -(-most_tokens // TOKENS)
        self._sums_bytes = most_rows * blocks * SUM_BYTES
        codes = np.random.default_rng(0).standard_normal(most_depth * blocks * TOKENS, np.float32)
        room = Arena(codes.nbytes // 2 + pool.num_threads * self._sums_bytes)
        self._x = room.array(np.uint16, codes.shape)
        self._x[:] = codes.view(np.uint32) >> 16
        self._sums = room.array(np.float32, (1,), codes.nbytes // 2)

    def seconds(self, matrices: Matrices, num_matrices: int, cut: Cut, num_tokens: int) -> float:
        """One call for ``num_matrices`` matrices."""
        record = np.zeros(1, PRODUCT_JOB)
        job = record[0]
        job["stage"], job["num_phases"] = stage_address(make_product_stage, cut.depth), 2
        job["taken"] = self._pool.words[TAKEN:].ctypes.data
        job["x"], job["sums"] = self._x.ctypes.data, self._sums.ctypes.data
        job["sums_bytes"], job["num_matrices"] = self._sums_bytes, num_matrices
        job["num_blocks"], job["blocks"] = -(-num_tokens // TOKENS), cut.blocks
        job["w"], job["stride"] = matrices.address, matrices.stride
        job["num_rows"], job["num_runs"] = matrices.num_rows, matrices.num_runs
        job["depth"], job["row_bytes"] = matrices.depth, 2 * matrices.depth
        job["apart"] = matrices.num_rows * 2 * matrices.depth
        job["rows"] = cut.rows * (3 - matrices.num_runs)
        number = self._pool.add_job(record)
        try:
            began = time.perf_counter()
            self._pool.ring(number)
            self._pool.wait()
            return time.perf_counter() - began
        finally:
            self._pool.remove_job(number)


def matrix_sets(arena: Arena, shape: Shape) -> dict[str, list[Matrices]]:
    """Of w13 and of w2, the first of each ``shape.routed`` experts in the arena."""
    experts, _ = fill_experts(arena, shape, parse_kind("bf16"))
    first = range(0, experts.num_experts - shape.routed + 1, shape.routed)
    w13, w2 = (experts.w13, experts.w13_stride), (experts.w2, experts.w2_stride)
    return {
        "w13": [Matrices(w13[0] + n * w13[1], w13[1], shape.width, 2, shape.hidden) for n in first],
        "w2": [Matrices(w2[0] + n * w2[1], w2[1], shape.hidden, 1, shape.width) for n in first],
    }


def matrix_rows(
    name: str, sets: list[Matrices], routed: int, products: Products, cuts: list[Cut], count: int
) -> list[Row]:
    """TFLOP/s of each setting for ``count`` tokens, in turns, beside the best one's."""
    one, following = sets[0], itertools.cycle(sets)
    flops = 2 * routed * one.num_runs * one.num_rows * one.depth * count
    times: dict[Cut, list[float]] = {cut: [] for cut in cuts}
    for _ in range(CALLS + 1):
        for cut in cuts:
            times[cut].append(products.seconds(next(following), routed, cut, count))
    rates = {cut: flops / statistics.median(times[cut][1:]) / 1e12 for cut in cuts}
    best = max(rates.values())
    return [
        at_least(
            f"{name}, M = {count}, {cut.depth} x {cut.rows} x {cut.blocks}"
            + (" (in use)" if cut == IN_USE else ""),
            *(rate, "TFLOP/s", best, rate / best, LEAST_PART if cut == IN_USE else 0.0),
        )
        for cut, rate in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="workers (default: the pool's own choice)")
    for name, default in (
        ("tokens", "32,128,512"),
        ("depths", "256,512,1024"),
        ("rows", "32,64,128"),
        ("blocks", "8,32"),
    ):
        parser.add_argument(f"--{name}", default=default, help="with commas")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="with commas")
    options = parser.parse_args()
    tokens, *sizes = (
        [int(n) for n in text.split(",")]
        for text in (options.tokens, options.depths, options.rows, options.blocks)
    )
    cuts = [
        IN_USE,
        *(cut for cut in itertools.starmap(Cut, itertools.product(*sizes)) if cut != IN_USE),
    ]
    print(host_isa().summary(), file=sys.stderr)
    shapes = [SHAPES[name] for name in options.shapes.split(",")]
    arena = Arena(max(shape.arena_bytes for shape in shapes))
    rows: list[Row] = []
    with WorkerPool(options.threads) as pool:
        print(f"{pool.num_threads} workers")
        most_rows = 2 * max(cut.rows for cut in cuts)
        for shape in shapes:
            products = Products(pool, max(shape.hidden, shape.width), max(tokens), most_rows)
            for matrix, sets in matrix_sets(arena, shape).items():
                name = f"{shape.name} {matrix}"
                for count in tokens:
                    rows += matrix_rows(name, sets, shape.routed, products, cuts, count)
            print(table([row for row in rows if row.name.startswith(shape.name)]), flush=True)
    write(rows, OUTPUT)


if __name__ == "__main__":
    main()

"""CPU expert layers beside a plain read by the same workers, and the cost of a layer call.

    python -m scripts.bench.cpu_experts [--threads N] [--rounds 15]

Prints a table and writes build/bench-cpu.json. Each round takes, in turn, a plain read of the arena
at its best number of workers and layer calls that go once through the same arena with 1, 4 and 8
tokens; ratios are medians over the rounds. The arena is many times the last-level cache.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiled import warmup
from cpu_kernels.expert_mlp import ExpertPool, aligned_floats
from cpu_kernels.expert_reference import f32_to_bf16
from cpu_kernels.isa import host_isa
from scripts.bench.rows import Row, at_least, at_most, table, write

# name: experts held, routed per token, hidden, expert width
SHAPES = {"mixtral-8x7b": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768)}
TOKENS = {4: 1.25, 8: 1.6}  # tokens that share experts: largest time in units of one token's
BANDWIDTH_TARGET = 0.85
EMPTY_CALL_US = 15.0
EMPTY_CALLS = 1000
OUTPUT = Path("build/bench-cpu.json")


def make_arena(num_elements: int) -> npt.NDArray[np.uint16]:
    """Normal bf16 weights, one random block repeated: random bits would be full of denormals."""
    rng = np.random.default_rng(0)
    block = f32_to_bf16(rng.standard_normal(1 << 20, np.float32) / np.float32(64))
    arena = np.empty(num_elements, np.uint16)
    for at in range(0, num_elements, block.size):
        arena[at : at + block.size] = block[: num_elements - at]
    return arena


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class LayerCalls:
    """Layer calls for ``num_tokens`` tokens that all use the same ``routed`` experts."""

    def __init__(
        self, pool: ExpertPool, arrays: tuple[npt.NDArray[Any], ...], routed: int, num_tokens: int
    ) -> None:
        num_experts, hidden, _ = arrays[1].shape
        self._pool, self._arrays = pool, arrays
        self._x_TH = aligned_floats(num_tokens * hidden).reshape(num_tokens, hidden)
        self._x_TH[:] = np.random.default_rng(1).standard_normal(self._x_TH.shape, np.float32)
        self._out_TH = np.empty_like(self._x_TH)
        self._token_P = np.repeat(np.arange(num_tokens), routed)
        self._weight_P = np.full(num_tokens * routed, 1 / routed, np.float32)
        self._experts = [
            np.tile(np.arange(first, first + routed), num_tokens)
            for first in range(0, num_experts, routed)
        ]

    @property
    def num_calls(self) -> int:
        return len(self._experts)

    def run(self) -> None:
        """Go once through all experts."""
        pairs = (self._token_P, self._weight_P)
        for expert_P in self._experts:
            self._pool.submit(*self._arrays, self._x_TH, expert_P, *pairs, self._out_TH)
        self._pool.wait()


def best_readers(pool: ExpertPool, arena: npt.NDArray[Any]) -> int:
    """The number of workers that reads the arena fastest."""
    most = pool.num_threads
    counts = sorted({max(1, most * eighths // 8) for eighths in range(3, 9)} | {max(1, most - 1)})
    times = {
        n: statistics.median(seconds(lambda n=n: pool.read(arena, n)) for _ in range(5))  # type: ignore[misc]
        for n in counts
    }
    return min(times, key=lambda n: times[n])


def shape_rows(
    pool: ExpertPool, whole: npt.NDArray[Any], name: str, rounds: int
) -> tuple[list[Row], float]:
    """The rows of one shape; and the fastest that memory was read by any means, in GB/s."""
    num_experts, routed, hidden, width = SHAPES[name]
    half = num_experts * 2 * width * hidden
    arena = whole[: half // 2 * 3]
    arrays = (
        arena[:half].reshape(num_experts, 2 * width, hidden),
        arena[half:].reshape(num_experts, hidden, width),
    )
    readers = best_readers(pool, arena)
    layers = {tokens: LayerCalls(pool, arrays, routed, tokens) for tokens in (1, *TOKENS)}
    for layer in layers.values():
        layer.run()
    read_s: list[float] = []
    layer_s: dict[int, list[float]] = {tokens: [] for tokens in layers}
    for _ in range(rounds):
        read_s.append(seconds(lambda: pool.read(arena, readers)))
        for tokens, layer in layers.items():
            layer_s[tokens].append(seconds(layer.run))
    one_s, giga, per_call = layer_s[1], arena.nbytes / 1e9, 1e3 / layers[1].num_calls
    median = statistics.median
    title = f"{name}, bf16, {routed} of {num_experts}"
    rows = [
        at_least(
            f"{title}, M = 1, against {readers} readers",
            giga / median(one_s),
            "GB/s",
            giga / median(read_s),
            median(r / s for r, s in zip(read_s, one_s, strict=True)),
            BANDWIDTH_TARGET,
        )
    ]
    for tokens, target in TOKENS.items():
        rows.append(
            at_most(
                f"{title}, M = {tokens}, against M = 1",
                median(layer_s[tokens]) * per_call,
                "ms",
                median(one_s) * per_call,
                median(s / one for s, one in zip(layer_s[tokens], one_s, strict=True)),
                target,
            )
        )
    return rows, giga / min(*read_s, *one_s)


def empty_call_row(pool: ExpertPool) -> Row:
    """A layer call from Python whose experts are so small that only the call itself counts."""
    arrays = (np.zeros((8, 2, 16), np.uint16), np.zeros((8, 16, 1), np.uint16))
    x_TH = np.zeros((1, 16), np.float32)
    expert_P, token_P = np.zeros(0, np.int64), np.zeros(0, np.int64)
    pairs = (expert_P, token_P, np.zeros(0, np.float32))
    out_TH = np.empty_like(x_TH)

    def call() -> None:
        pool.submit(*arrays, x_TH, *pairs, out_TH)
        pool.wait()

    for _ in range(EMPTY_CALLS):
        call()
    value = statistics.median(seconds(call) for _ in range(EMPTY_CALLS)) * 1e6
    name = "layer call from Python, no work"
    return at_most(name, value, "us", EMPTY_CALL_US, value / EMPTY_CALL_US, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="workers (default: the pool's own choice)")
    parser.add_argument("--rounds", type=int, default=15, help="paired measurements per row")
    options = parser.parse_args()
    print(f"compiled in {warmup(np.uint16):.1f} s; {host_isa().summary()}", file=sys.stderr)
    arena = make_arena(max(3 * e * h * w for e, _, h, w in SHAPES.values()))
    with ExpertPool(options.threads) as pool:
        results = [shape_rows(pool, arena, name, options.rounds) for name in SHAPES]
        rows = [row for shape, _ in results for row in shape] + [empty_call_row(pool)]
        print(f"{pool.num_threads} workers; fastest read {max(f for _, f in results):.1f} GB/s")
    print(table(rows))
    write(rows, OUTPUT)


if __name__ == "__main__":
    main()

"""CPU expert layers at many tokens: GFLOP/s beside the kernels' own tile in the cache.

    python -m scripts.bench.cpu_prefill [--threads N] [--json] [--rounds 5]

Ratios are medians of pairs (layer, tile); the tile is the kernels' tile of float32 rows in the
first-level cache, on all threads at once.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cpu_kernels.compiled import warmup
from cpu_kernels.dot_tile import ROWS, TOKENS, dot_tile_f32
from cpu_kernels.expert_mlp import ExpertPool, aligned_floats
from cpu_kernels.expert_reference import f32_to_bf16
from cpu_kernels.isa import host_isa

# name: experts held, routed per token, hidden, expert width
PREFILL_SHAPES = {"mixtral-8x7b": (1, 1, 4096, 14336), "qwen3-30b-a3b": (4, 4, 2048, 768)}
PREFILL_TOKENS = (8, 64, 256)

Row = dict[str, str | float]


@numba.njit(nogil=True)
def tile_in_cache(rows: Any, xs: Any, length: int, out: int, repeats: int) -> None:
    """The kernels' own tile of float32 rows, again and again."""
    for _ in range(repeats):
        dot_tile_f32(rows, 0, xs, 0, length, out, ROWS)


def weights(num_experts: int, hidden: int, width: int) -> tuple[npt.NDArray[np.uint16], ...]:
    """Normal bf16 weights, one random block repeated: random bits would be full of denormals."""
    rng = np.random.default_rng(0)
    block = f32_to_bf16(rng.standard_normal(1 << 20, np.float32) / np.float32(64))
    shapes = ((num_experts, 2 * width, hidden), (num_experts, hidden, width))
    return tuple(np.resize(block, shape) for shape in shapes)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextmanager
def layer_calls(
    pool: ExpertPool, arrays: tuple[npt.NDArray[Any], ...], routed: int, num_tokens: int
) -> Iterator[Callable[[], None]]:
    """Calls of one layer for ``num_tokens`` tokens; each call takes the next ``routed`` experts."""
    rng = np.random.default_rng(1)
    num_experts, hidden = len(arrays[0]), arrays[0].shape[2]
    x_TH = aligned_floats(num_tokens * hidden).reshape(num_tokens, hidden)
    x_TH[:] = rng.standard_normal(x_TH.shape, np.float32)
    out_TH = np.empty_like(x_TH)
    token_P = np.repeat(np.arange(num_tokens), routed)
    weight_P = np.full(num_tokens * routed, 1 / routed, np.float32)
    first = 0

    def call() -> None:
        nonlocal first
        expert_P = np.tile((first + np.arange(routed)) % num_experts, num_tokens)
        first += routed
        pool.submit(arrays[0], arrays[1], x_TH, expert_P, token_P, weight_P, out_TH)
        pool.wait()

    call()
    yield call


def tile_gflops(num_threads: int) -> float:
    """The kernels' register tile on rows in the first-level cache, on all threads at once."""
    length, repeats = 512, 100_000

    def run(_: int) -> None:
        data = aligned_floats((ROWS + TOKENS + 1) * length)
        data[:] = 1
        at = data.ctypes.data + 4 * length * np.arange(ROWS + TOKENS + 1)
        tile_in_cache(at[:ROWS], at[ROWS:-1].copy(), length, int(at[-1]), repeats)

    with ThreadPoolExecutor(num_threads) as executor:
        times = [seconds(lambda: list(executor.map(run, range(num_threads)))) for _ in range(6)]
    return num_threads * repeats * ROWS * TOKENS * length * 2 / min(times[1:]) / 1e9


def prefill_row(pool: ExpertPool, name: str, num_tokens: int, rounds: int) -> Row:
    num_experts, routed, hidden, width = PREFILL_SHAPES[name]
    arrays = weights(num_experts, hidden, width)
    flops = 2 * num_tokens * routed * 3 * hidden * width
    with layer_calls(pool, arrays, routed, num_tokens) as call:
        pairs = [
            (flops / seconds(call) / 1e9, tile_gflops(pool.num_threads)) for _ in range(rounds)
        ]
    return {
        "name": f"{name}, {routed} experts, M = {num_tokens}",
        "value": statistics.median(rate for rate, _ in pairs),
        "unit": "GFLOP/s",
        "limit": statistics.median(limit for _, limit in pairs),
        "ratio": statistics.median(rate / limit for rate, limit in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="workers (default: the pool's own choice)")
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements per row")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    print(f"compiled in {warmup(np.uint16):.1f} s; {host_isa().summary()}", file=sys.stderr)
    with ExpertPool(options.threads) as pool:
        rows = [
            prefill_row(pool, name, tokens, options.rounds)
            for name in PREFILL_SHAPES
            for tokens in PREFILL_TOKENS
        ]
        if options.json:
            print(json.dumps({"threads": pool.num_threads, "rows": rows}, indent=1))
            return
        print(f"{pool.num_threads} threads")
        line = "{name:38} {value:8.1f} {unit:8} of {limit:6.1f}: {ratio:.2f}"
        print("\n".join(line.format_map(row) for row in rows))


if __name__ == "__main__":
    main()

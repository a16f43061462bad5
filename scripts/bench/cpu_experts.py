"""CPU expert layers beside a plain read by the same workers, and the cost of a layer call.

    python -m scripts.bench.cpu_experts [--threads N] [--rounds 15] [--kinds bf16/f32,w4g128/int8]

Prints a table and writes build/bench-cpu.json. Each round takes, in turn, a plain read of the arena
at its best number of workers and layer calls that go once through the same arena with 1, 4 and 8
tokens; ratios are medians over the rounds. The arena is several times the last-level cache. The
narrower instruction sets are measured in processes of their own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cpu_kernels.addresses import i64_array
from cpu_kernels.arena import Arena
from cpu_kernels.compiled import kernels
from cpu_kernels.expert_layer import ExpertLayer
from cpu_kernels.expert_pool import ExpertPool, aligned_floats
from cpu_kernels.experts import Experts
from cpu_kernels.intrinsics import atomic_load, njit, pause, store_release
from cpu_kernels.isa import VARIABLE, host_isa
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.read_kernel import read
from cpu_kernels.weight_kind import parse_kind
from cpu_kernels.worker import DONE_BELL, DOORBELL, NUM_WORDS
from scripts.bench.cpu_arena import SHAPES, Shape, fill_experts
from scripts.bench.rows import Row, at_least, at_most, row_from, table, write

# Least share of a plain read that one token must reach, by the weights' codes; and the same with
# FIDDLER_ISA=avx2 and avxvnni.
BANDWIDTH = {"bf16": 0.85, "bf12": 0.85, "int8": 0.85, "int4": 0.75}
NARROW_BANDWIDTH = {"bf16": 0.75, "bf12": 0.75, "int8": 0.75, "int4": 0.6}
KINDS = "bf16/f32,bf16/bf16,bf12/f32,w8g128/f32,w8g128/int8,w4g128/int8"  # weights/activations
NARROW_KINDS = "bf16/f32,bf12/f32,w4g128/int8"
TOKENS = {4: 1.25, 8: 1.6}  # tokens that share experts: largest time in units of one token's
EMPTY_CALL_US = 15.0
EMPTY_FLAG_US = 3.0
EMPTY_CALLS = 2000
OUTPUT = Path("build/bench-cpu.json")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@njit(nogil=True)
def feed(words_address, numbers, times):  # type: ignore[no-untyped-def]
    """Ring jobs as a GPU would, by stores to the words, and wait for each by looking at them."""
    words = i64_array(words_address, NUM_WORDS)
    for _ in range(times):
        for number in numbers:
            store_release(words, DONE_BELL, 0)
            store_release(words, DOORBELL, number)
            while atomic_load(words, DONE_BELL) != number:
                pause()


class LayerCalls:
    """Layer calls for ``num_tokens`` tokens that all use the same experts, a set at a time.

    Fed by the doorbell as in a decode step, or from Python where the caller works too.
    """

    def __init__(
        self,
        pool: ExpertPool,
        experts: Experts,
        activations: Activations,
        shape: Shape,
        num_tokens: int,
    ) -> None:
        self._pool = pool
        x_TH = aligned_floats(num_tokens * shape.hidden).reshape(num_tokens, shape.hidden)
        x_TH[:] = np.random.default_rng(1).standard_normal(x_TH.shape, np.float32)
        weights_TS = np.full((num_tokens, shape.routed), 1 / shape.routed, np.float32)
        self._layers: list[ExpertLayer] = []
        for first in range(0, experts.num_experts - shape.routed + 1, shape.routed):
            ids = np.arange(first, first + shape.routed, dtype=np.int32)
            layer = pool.add_layer(experts, activations=activations)
            pool.bind(layer, x_TH, np.tile(ids, (num_tokens, 1)), weights_TS, np.empty_like(x_TH))
            self._layers.append(layer)
        self._numbers = np.array([layer.number for layer in self._layers])

    @property
    def num_calls(self) -> int:
        return len(self._layers)

    def run(self) -> None:
        """Go once through all experts."""
        if self._pool.workers.caller_works:
            for layer in self._layers:
                self._pool.submit(layer, *layer.step)
            self._pool.wait()
        else:
            feed(self._pool.workers.words.ctypes.data, self._numbers, 1)

    def close(self) -> None:
        for layer in self._layers:
            self._pool.remove_layer(layer)


def best_readers(pool: ExpertPool, arena: np.ndarray) -> int:
    """The number of workers that reads the arena fastest."""
    most = pool.num_threads
    counts = sorted({max(1, most * eighths // 8) for eighths in range(3, 9)} | {max(1, most - 1)})
    times = {
        n: statistics.median(seconds(lambda n=n: read(pool.workers, arena, n)) for _ in range(5))  # type: ignore[misc]
        for n in counts
    }
    return min(times, key=lambda n: times[n])


def kind_rows(
    pool: ExpertPool,
    arena: Arena,
    shape: Shape,
    kind: str,
    options: argparse.Namespace,
) -> tuple[list[Row], float]:
    """The rows of one shape and kind; and the fastest that memory was read by any means, GB/s."""
    weights, activations = kind.split("/")
    tokens = {} if options.narrow else TOKENS
    targets = NARROW_BANDWIDTH if options.narrow else BANDWIDTH
    experts, used = fill_experts(arena, shape, parse_kind(weights))
    layers = {
        count: LayerCalls(pool, experts, _activations(activations), shape, count)
        for count in (1, *tokens)
    }
    readers = best_readers(pool, used)
    read_s: list[float] = []
    layer_s: dict[int, list[float]] = {count: [] for count in layers}
    with pool.workers.awake():
        for calls in layers.values():
            calls.run()
        for _ in range(options.rounds):
            read_s.append(seconds(lambda: read(pool.workers, used, readers)))
            for count, calls in layers.items():
                layer_s[count].append(seconds(calls.run))
    for calls in layers.values():
        calls.close()
    one_s, giga, per_call = layer_s[1], used.nbytes / 1e9, 1e3 / layers[1].num_calls
    median = statistics.median
    title = f"{shape.name}, {kind}, {shape.routed} of {shape.experts}"
    rows = [
        at_least(
            f"{title}, M = 1, against {readers} readers",
            giga / median(one_s),
            "GB/s",
            giga / median(read_s),
            median(r / s for r, s in zip(read_s, one_s, strict=True)),
            targets[experts.kind.codes],
        )
    ]
    for count, target in tokens.items():
        rows.append(
            at_most(
                f"{title}, M = {count}, against M = 1",
                median(layer_s[count]) * per_call,
                "ms",
                median(one_s) * per_call,
                median(s / one for s, one in zip(layer_s[count], one_s, strict=True)),
                target,
            )
        )
    return rows, giga / min(*read_s, *one_s)


def _activations(name: str) -> Activations:
    names: dict[str, Activations] = {"f32": "f32", "bf16": "bf16", "int8": "int8"}
    return names[name]


def empty_call_rows(pool: ExpertPool, arena: Arena) -> list[Row]:
    """A layer call without a choice of expert, from Python and by the doorbell."""
    shape = SHAPES["qwen3-30b-a3b"]
    experts, _ = fill_experts(arena, shape, parse_kind("bf16"), num_experts=shape.routed)
    layer = pool.add_layer(experts)
    x_TH = np.zeros((1, shape.hidden), np.float32)
    out_TH = np.empty_like(x_TH)
    ids_TS = np.full((1, shape.routed), -1, np.int32)
    weights_TS = np.zeros((1, shape.routed), np.float32)

    def call() -> None:
        pool.submit(layer, x_TH, ids_TS, weights_TS, out_TH)
        pool.wait()

    for _ in range(EMPTY_CALLS):
        call()
    value = statistics.median(seconds(call) for _ in range(EMPTY_CALLS)) * 1e6
    name = "layer call from Python, no work"
    rows = [at_most(name, value, "us", EMPTY_CALL_US, value / EMPTY_CALL_US, 1.0)]
    if not pool.workers.caller_works:
        with pool.workers.awake():
            arguments = (pool.workers.words.ctypes.data, np.array([layer.number]), EMPTY_CALLS)
            feed(*arguments)
            flag = statistics.median(seconds(lambda: feed(*arguments)) for _ in range(15))
            flag *= 1e6 / EMPTY_CALLS
        name = "layer call by the doorbell, workers awake, no work"
        rows.append(at_most(name, flag, "us", EMPTY_FLAG_US, flag / EMPTY_FLAG_US, 1.0))
    pool.remove_layer(layer)
    return rows


def narrow_rows(level: str, options: argparse.Namespace) -> list[Row]:
    """The rows of NARROW, from a process that is forced to an instruction set."""
    command = [sys.executable, "-m", "scripts.bench.cpu_experts", "--narrow"]
    command += ["--rounds", str(options.rounds)]
    if options.threads:
        command += ["--threads", str(options.threads)]
    forced = os.environ | {VARIABLE: level}
    run = subprocess.run(command, env=forced, capture_output=True, text=True)
    if run.returncode:
        reason = run.stderr.strip().splitlines() or [f"ended with {run.returncode}"]
        print(f"{VARIABLE}={level}: {reason[-1]}", file=sys.stderr)
        return []
    return [row_from(row) for row in json.loads(run.stdout)]


def measure(options: argparse.Namespace) -> tuple[list[Row], float]:
    """All rows that this process measures, and the fastest read in GB/s."""
    arena = Arena(max(shape.arena_bytes for shape in SHAPES.values()))
    chosen = (options.kinds or (NARROW_KINDS if options.narrow else KINDS)).split(",")
    rows, fastest = [], 0.0
    with ExpertPool(options.threads) as pool:
        for shape in SHAPES.values():
            for kind in chosen:
                found, speed = kind_rows(pool, arena, shape, kind, options)
                rows += found
                fastest = max(fastest, speed)
        if not options.narrow:
            rows += empty_call_rows(pool, arena)
            print(f"{pool.num_threads} workers; fastest read {fastest:.1f} GB/s")
    prefix = f"{VARIABLE}={host_isa().level}, " if options.narrow else ""
    return [row.renamed(prefix + row.name) for row in rows], fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="workers (default: the pool's own choice)")
    parser.add_argument("--rounds", type=int, default=15, help="paired measurements per row")
    parser.add_argument("--kinds", help="weights/activations, with commas (default: all)")
    parser.add_argument("--narrow", action="store_true", help="the rows of one FIDDLER_ISA as JSON")
    options = parser.parse_args()
    if options.narrow:
        rows, _ = measure(options)
        print(json.dumps([row.as_dict() for row in rows]))
        return
    started = time.perf_counter()
    kernels()
    spent = time.perf_counter() - started
    print(f"worker loop ready in {spent:.1f} s; {host_isa().summary()}", file=sys.stderr)
    rows, _ = measure(options)
    if not options.kinds:
        for level in ("avx2", "avxvnni"):
            rows += narrow_rows(level, options)
    print(table(rows))
    write(rows, OUTPUT)


if __name__ == "__main__":
    main()

"""CPU experts with many tokens: ms and GFLOP/s of each kernel, and which is the fastest.

    python -m scripts.bench.cpu_prefill [--threads N] [--tokens 16,64] [--shapes qwen3-30b-a3b]

Prints a table per shape and writes build/bench-cpu-prefill.json. A layer call has the experts that
a token of the shape chooses, all with M tokens, and each call takes others, so that the weights
come from memory. "by columns" are experts with bf16 activations computed by columns, taken in turn
with the kernel that goes row by row; "torch" is one product of torch's for each matrix of bf16,
with all of its own threads, weights from memory too. Medians of up to five calls.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch

from cpu_kernels.arena import Arena
from cpu_kernels.compiled import kernels
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.isa import host_isa
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.times import measure_times
from cpu_kernels.weight_kind import parse_kind
from scripts.bench.cpu_arena import SHAPES, Shape, fill_experts
from scripts.bench.rows import Row, at_least, at_most, write

KINDS: tuple[tuple[str, Activations], ...] = (
    *(("bf16", "f32"), ("bf16", "bf16"), ("bf12", "f32"), ("bf12", "bf16")),
    *(("w8g128", "int8"), ("w4g128", "int8")),
)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
BUDGET_S = 5.0  # for one shape and kind; the 8 tables took 35 s on 16 cores
TORCH_CALLS = 5
LEAST_RATE = 0.8  # of a kernel's best GFLOP/s, at any M
OUTPUT = Path("build/bench-cpu-prefill.json")
BY_COLUMNS = "by columns"
Times = dict[str, tuple[float, ...]]


def shape_times(
    pool: ExpertPool, arena: Arena, shape: Shape, tokens: tuple[int, ...], budget_s: float
) -> Times:
    """Seconds of an expert by kernel, for the numbers of tokens."""
    found: Times = {}
    for weights, activations in KINDS:
        experts, _ = fill_experts(arena, shape, parse_kind(weights))
        table = measure_times(
            pool, experts, activations, tokens=tokens, routed=shape.routed, budget_s=budget_s
        )
        found[table.kernel] = table.rows_s
        if table.columns_s is not None:
            found[f"{weights} {BY_COLUMNS}"] = table.columns_s
            if weights == "bf16":
                found["torch"] = torch_times(arena, shape, experts.num_experts, tokens)
        print(f"{shape.name}, {table.kernel}: measured", file=sys.stderr)
    return found


def torch_times(
    arena: Arena, shape: Shape, num_experts: int, tokens: tuple[int, ...]
) -> tuple[float, ...]:
    """Of the bf16 experts at the arena's start, one after the other, each by two products."""
    hidden, width = shape.hidden, shape.width
    codes = torch.from_numpy(arena.array("int16", (num_experts * shape.elements,)))
    w13_size = num_experts * 2 * width * hidden
    w13_EFH = codes[:w13_size].view(torch.bfloat16).view(num_experts, 2 * width, hidden)
    w2_EHI = codes[w13_size:].view(torch.bfloat16).view(num_experts, hidden, width)
    next_expert = itertools.cycle(range(num_experts))
    medians = []
    for count in tokens:
        x_TH = torch.randn(count, hidden).bfloat16()
        times = []
        for _ in range(TORCH_CALLS):
            expert, began = next(next_expert), time.perf_counter()
            gate_TI, up_TI = (x_TH @ w13_EFH[expert].T).chunk(2, dim=-1)
            (torch.nn.functional.silu(gate_TI) * up_TI) @ w2_EHI[expert].T
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times))
    return tuple(medians)


def shape_text(shape: Shape, tokens: tuple[int, ...], found: Times) -> str:
    """ms per expert (GFLOP/s) by M and kernel, and the fastest one."""
    lines = [f"{shape.name}: ms per expert (GFLOP/s)"]
    lines += [f"{'M':>5} " + "".join(f"{name:>18}" for name in found) + "  fastest of bf16, of all"]
    for n, count in enumerate(tokens):
        cells = (
            f"{seconds[n] * 1e3:9.2f} ({gflops(shape, count, seconds[n]):6.0f})"
            for seconds in found.values()
        )
        by_time = sorted(found, key=lambda name: found[name][n])
        of_bf16 = next(name for name in by_time if name.startswith(("bf16", "torch")))
        lines.append(f"{count:5} " + " ".join(cells) + f"  {of_bf16}, {by_time[0]}")
    return "\n".join(lines)


def shape_rows(shape: Shape, tokens: tuple[int, ...], found: Times) -> list[Row]:
    """GFLOP/s against the same kernel's best; columns against torch."""
    rows = []
    for name, seconds in found.items():
        rates = [gflops(shape, *point) for point in zip(tokens, seconds, strict=True)]
        for count, rate in zip(tokens, rates, strict=True):
            title = f"{shape.name}, {name}, M = {count}, against its best"
            ratio = rate / max(rates)
            rows.append(at_least(title, rate, "GFLOP/s", max(rates), ratio, LEAST_RATE))
    for name in (name for name in found if name.endswith(BY_COLUMNS)):
        for count, own_s, torch_s in zip(tokens, found[name], found["torch"], strict=True):
            title = f"{shape.name}, M = {count}, {name} against torch"
            rows.append(at_most(title, own_s * 1e3, "ms", torch_s * 1e3, own_s / torch_s, 1.0))
    return rows


def gflops(shape: Shape, num_tokens: int, seconds: float) -> float:
    return 2 * num_tokens * shape.elements / seconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, help="workers (default: the pool's own choice)")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="M, with commas")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="with commas")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds per shape and kind")
    options = parser.parse_args()
    tokens = tuple(map(int, options.tokens.split(",")))
    shapes = [SHAPES[name] for name in options.shapes.split(",")]
    kernels()
    print(host_isa().summary(), file=sys.stderr)
    started, rows = time.perf_counter(), []
    torch.set_num_threads(options.threads or torch.get_num_threads())
    arena = Arena(max(shape.arena_bytes for shape in shapes))
    with ExpertPool(options.threads) as pool:
        print(f"{pool.num_threads} workers")
        for shape in shapes:
            found = shape_times(pool, arena, shape, tokens, options.budget)
            print(shape_text(shape, tokens, found), flush=True)
            rows += shape_rows(shape, tokens, found)
    write(rows, OUTPUT)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

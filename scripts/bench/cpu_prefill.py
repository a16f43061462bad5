"""CPU experts with many tokens: ms and GFLOP/s of each kernel, and from where torch is faster.

    python -m scripts.bench.cpu_prefill [--threads N] [--tokens 16,64] [--shapes qwen3-30b-a3b]

Prints a table per shape and writes build/bench-cpu-prefill.json. A layer call has the experts that
a token of the shape chooses, all with M tokens, and each call takes others, so that the weights
come from memory. "handed over" is torch's product of the same bf16/bf16 experts, taken in turn with
the own kernel. Medians of up to five calls.
"""

import argparse
import sys
import time
from pathlib import Path

from cpu_kernels.arena import Arena
from cpu_kernels.compiled import kernels
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.isa import host_isa
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.times import TimeTable, measure_times
from cpu_kernels.weight_kind import parse_kind
from scripts.bench.cpu_arena import SHAPES, Shape, fill_experts
from scripts.bench.rows import Row, at_least, at_most, write

KINDS: tuple[tuple[str, Activations], ...] = (
    *(("bf16", "f32"), ("bf16", "bf16")),
    *(("w8g128", "int8"), ("w4g128", "int8")),
)
HANDED = "handed over"
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512)
BUDGET_S = 5.0  # for one shape and kind; the 8 tables took 35 s on 16 cores
LEAST_RATE = 0.8  # of a kernel's best GFLOP/s, at any M
OUTPUT = Path("build/bench-cpu-prefill.json")


def shape_tables(
    pool: ExpertPool, arena: Arena, shape: Shape, tokens: tuple[int, ...], budget_s: float
) -> list[TimeTable]:
    tables = []
    for weights, activations in KINDS:
        experts, _ = fill_experts(arena, shape, parse_kind(weights))
        table = measure_times(
            pool,
            experts,
            activations,
            tokens=tokens,
            routed=shape.routed,
            budget_s=budget_s,
        )
        tables.append(table)
        print(f"{shape.name}, {table.kernel}: measured", file=sys.stderr)
    return tables


def columns(tables: list[TimeTable]) -> dict[str, tuple[float, ...]]:
    """Seconds by implementation, for the numbers of tokens of the tables."""
    found = {table.kernel: table.own_s for table in tables}
    for table in tables:
        if table.handed_s is not None:
            found[HANDED] = table.handed_s
    return found


def shape_text(shape: Shape, tables: list[TimeTable]) -> str:
    """ms per expert (GFLOP/s) by M and implementation, the fastest one, the switch-over."""
    found = columns(tables)
    lines = [f"{shape.name}: ms per expert (GFLOP/s)"]
    lines += [f"{'M':>5} " + "".join(f"{name:>18}" for name in found) + "  fastest of bf16, of all"]
    for n, count in enumerate(tables[0].tokens):
        cells = (
            f"{seconds[n] * 1e3:9.2f} ({gflops(shape, count, seconds[n]):6.0f})"
            for seconds in found.values()
        )
        by_time = sorted(found, key=lambda name: found[name][n])
        of_bf16 = next(name for name in by_time if not name.startswith("w"))
        lines.append(f"{count:5} " + " ".join(cells) + f"  {of_bf16}, {by_time[0]}")
    for table in tables:
        if table.handed_s is not None:
            first = table.switch_over()
            when = f"from M = {first}" if first else "never"
            lines.append(f"{table.kernel} experts: hand over {when}")
    return "\n".join(lines)


def shape_rows(shape: Shape, tables: list[TimeTable]) -> list[Row]:
    """GFLOP/s against the same implementation's best; handing over against the own kernel."""
    rows = []
    for name, seconds in columns(tables).items():
        counts = tables[0].tokens
        rates = [gflops(shape, *point) for point in zip(counts, seconds, strict=True)]
        for count, rate in zip(counts, rates, strict=True):
            title = f"{shape.name}, {name}, M = {count}, against its best"
            ratio = rate / max(rates)
            rows.append(at_least(title, rate, "GFLOP/s", max(rates), ratio, LEAST_RATE))
    for table in tables:
        for count, own_s, handed_s in zip(
            table.tokens, table.own_s, table.handed_s or (), strict=False
        ):
            title = f"{shape.name}, {table.kernel}, M = {count}, handed over against own"
            ratio = handed_s / own_s
            rows.append(at_most(title, handed_s * 1e3, "ms", own_s * 1e3, ratio, 1.0))
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
    arena = Arena(max(shape.arena_bytes for shape in shapes))
    with ExpertPool(options.threads) as pool:
        print(f"{pool.num_threads} workers")
        for shape in shapes:
            tables = shape_tables(pool, arena, shape, tokens, options.budget)
            print(shape_text(shape, tables))
            rows += shape_rows(shape, tables)
    write(rows, OUTPUT)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()

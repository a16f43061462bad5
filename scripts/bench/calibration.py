"""Whether a table of expert times chooses well between tokens that it has and tokens in between.

    python -m scripts.bench.calibration [--threads N]

Measures the table that ``fiddler calibrate`` keeps of bf16 experts with bf16 activations, for which
there are two implementations, row by row and by columns of tokens; then both at numbers of
tokens that the table has not. What the table chooses there should be within a tenth of the better
one, and all of them together 1.3 times as fast as the worse of always the one and always the other.
Writes build/bench-calibration.json.
"""

import argparse
import sys
from pathlib import Path

from cpu_kernels.arena import Arena
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.isa import host_isa
from cpu_kernels.thread_count import CACHES, MAX_BYTES, measured_num_threads
from cpu_kernels.times import TimeTable, measure_times
from cpu_kernels.topology import read_cache_bytes
from cpu_kernels.weight_kind import parse_kind
from offload.measuring import LEAST_ARENA, SIZES, Size
from offload.sample_experts import sample_bytes, sample_experts
from scripts.bench.rows import Row, at_least, at_most, table, write

HELD_OUT = (3, 6, 12, 48, 200)
MOST_OVER = 1.1  # of the better implementation's time
LEAST_GAIN = 1.3  # over the worse fixed choice, in all
BUDGET_S = 8.0
OUTPUT = Path("build/bench-calibration.json")


def measure(num_threads: int, size: Size) -> tuple[TimeTable, TimeTable]:
    """The table, and the held-out times, of the same experts."""
    kind = parse_kind("bf16")
    expert_bytes = sample_bytes(kind, size.hidden, size.width)
    room = max(LEAST_ARENA, min(MAX_BYTES, CACHES * read_cache_bytes()))
    num_experts = room // expert_bytes // size.routed * size.routed
    experts, _ = sample_experts(Arena(room), kind, size.hidden, size.width, num_experts)
    with ExpertPool(num_threads) as pool:
        known, held_out = (
            measure_times(
                pool, experts, "bf16", tokens=tokens, routed=size.routed, budget_s=budget_s
            )
            for tokens, budget_s in (
                (size.tokens(num_threads), size.budget_s),
                (HELD_OUT, BUDGET_S),
            )
        )
    return known, held_out


def rows_of(known: TimeTable, held_out: TimeTable) -> list[Row]:
    """Each held-out number of tokens by the table's choice, and their sum."""
    assert held_out.columns_s is not None
    first = known.switch_over()
    rows, chosen_s = [], []
    for count, rows_s, columns_s in zip(HELD_OUT, held_out.rows_s, held_out.columns_s, strict=True):
        has_columns = first is not None and count >= first
        chosen_s.append(columns_s if has_columns else rows_s)
        best_s = min(rows_s, columns_s)
        name = f"M = {count}, {'by columns' if has_columns else 'row by row'}, by the table"
        ratio = chosen_s[-1] / best_s
        rows.append(at_most(name, chosen_s[-1] * 1e3, "ms", best_s * 1e3, ratio, MOST_OVER))
    worst_s, total_s = max(sum(held_out.rows_s), sum(held_out.columns_s)), sum(chosen_s)
    name = "all of them, against the worse fixed choice"
    gain = worst_s / total_s
    return [*rows, at_least(name, total_s * 1e3, "ms", worst_s * 1e3, gain, LEAST_GAIN)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="workers (default: as measured)")
    options = parser.parse_args()
    num_threads = options.threads or measured_num_threads()
    size = SIZES[0]
    known, held_out = measure(num_threads, size)
    print(host_isa().summary(), file=sys.stderr)
    print(f"bf16/bf16, {size.hidden} x {size.width}, {num_threads} workers")
    print(f"by columns from M = {known.switch_over()} on, by the table")
    rows = rows_of(known, held_out)
    print(table(rows))
    write(rows, OUTPUT)


if __name__ == "__main__":
    main()

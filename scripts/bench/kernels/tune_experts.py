"""Times tile sizes of the expert kernels case by case.

Kernels are compiled ahead by several processes into Triton's cache, since that takes longer than
to time them. Each launch is tuned on its own while the other keeps its present size.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Literal

import torch

from gpu_kernels.expert_config import ExpertConfig, decode_config, prefill_config
from gpu_kernels.expert_decode import expert_decode
from gpu_kernels.grouped_gemm import grouped_experts, grouped_experts_reference
from gpu_kernels.tile_spec import TileConfig
from scripts.bench.kernels.expert_case import FORMATS, SHAPES, Case, make_layer
from scripts.bench.kernels.experts import decode_ms, matmul_ms, prefill_ms
from scripts.bench.kernels.timing import relative_error
from scripts.bench.kernels.tuner import try_each

Which = Literal["decode", "prefill"]
TOKENS: dict[Which, tuple[int, ...]] = {"decode": (1, 8), "prefill": (2048,)}
Job = tuple[str, str, int, TileConfig]  # shape, format of the weights, tokens, tile


def decode_tiles(weights: str) -> list[TileConfig]:
    """Rows, depth, warps and stages to try with 8 columns."""
    sizes = [
        *((16, 128, 1, stages) for stages in (3, 4, 6)),
        *((16, 256, 1, stages) for stages in (2, 3, 4)),
        *((32, 128, 1, 4), (32, 128, 2, 3), (32, 128, 2, 5), (32, 256, 2, 3), (64, 128, 4, 4)),
    ]
    if weights == "bf16":
        sizes += [(16, 64, 1, 6), (32, 64, 2, 6)]
    return [TileConfig(r, 8, d, warps, stages, True) for r, d, warps, stages in sizes]


def prefill_tiles(weights: str) -> list[TileConfig]:
    """Rows, columns, depth, warps and stages to try, and tiles of columns near each other."""
    if weights == "bf16":
        best = TileConfig(128, 128, 64, 8, 4)
        sizes = [
            *((128, 128, 64, 8, 3), (128, 128, 32, 8, 6), (64, 128, 64, 4, 3)),
            *((64, 128, 32, 4, 5), (64, 256, 64, 8, 3)),
        ]
    else:
        best = TileConfig(64, 128, 64, 4, 3)
        sizes = [
            *((64, 128, 64, 4, 2), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4)),
            *((64, 128, 64, 8, 4), (64, 128, 128, 4, 2), (64, 128, 32, 4, 5), (64, 64, 64, 4, 4)),
        ]
    return [best, replace(best, near=1)] + [TileConfig(*size) for size in sizes]


def tune(which: Which) -> None:
    """Print milliseconds of all tiles; the tiles' results are checked too."""
    cases = list(product(SHAPES, FORMATS, TOKENS[which]))
    start = time.perf_counter()
    # tokens of a decode case change neither its tiles nor what is compiled
    jobs = [
        (name, weights, TOKENS[which][-1], tile)
        for name, weights in product(SHAPES, FORMATS)
        for tile in tiles(which, weights)
    ]
    workers = max(1, min(14, (os.cpu_count() or 2) - 1))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(compile_tile, jobs))
    print(f"{torch.cuda.get_device_name()}: compiled in {time.perf_counter() - start:.0f} s")
    for name, weights, num_tokens in cases:
        print(f"{name} {weights} M={num_tokens}")
        tune_case(Case(SHAPES[name], make_layer(SHAPES[name], weights), num_tokens), which, weights)
    print(f"{time.perf_counter() - start:.0f} s in all")


def tiles(which: Which, weights: str) -> list[TileConfig]:
    return decode_tiles(weights) if which == "decode" else prefill_tiles(weights)


def present(case: Case, which: Which) -> ExpertConfig:
    """What the launchers use for the case now."""
    if which == "decode":
        return decode_config(case.layer, case.num_tokens, torch.bfloat16)
    return prefill_config(case.layer, case.num_tokens * case.shape.top_k, torch.bfloat16)


def compile_tile(job: Job) -> None:
    """Fill Triton's cache: both launches of the case with this tile."""
    name, weights, num_tokens, tile = job
    case = Case(SHAPES[name], make_layer(SHAPES[name], weights), num_tokens)
    kernel = expert_decode if num_tokens in TOKENS["decode"] else grouped_experts
    try:
        case.run(kernel, config=ExpertConfig(tile, tile))
        torch.cuda.synchronize()
    except Exception as error:  # too large for the device's shared memory, say
        print(f"{name} {weights} {tile}: {type(error).__name__}")


def tune_case(case: Case, which: Which, weights: str) -> None:
    """One line for each tile in each launch, and the best of both together."""
    kernel = expert_decode if which == "decode" else grouped_experts
    limit, expected = 0.0, torch.empty(0)
    if which == "prefill":
        limit, expected = matmul_ms(case), case.run(grouped_experts_reference)

    def measure(config: ExpertConfig) -> float:
        if which == "decode":
            return decode_ms(case, config=config)
        error = relative_error(case.run(kernel, config=config), expected)
        if not error <= 5e-3:  # goes on with the others: a run costs minutes
            print(f"WRONG, relative error {error:.1e}: {config}", flush=True)
            return math.inf
        return prefill_ms(case, config=config)

    now = best = present(case, which)
    base = measure(now)
    for launch in ("gate_up", "down"):
        configs = [replace(now, **{launch: tile}) for tile in tiles(which, weights)]
        results = try_each(configs, measure)
        best = replace(best, **{launch: getattr(results[0][1], launch)})
        for ms, config in results:
            print_line(launch, case, ms, base, limit, getattr(config, launch))
    print_line("both", case, measure(best), base, limit, best.gate_up)
    for name, us in launches(partial(case.run, kernel, config=best)):
        print(f"    {name:24} {us:8.1f} us")


def print_line(
    launch: str, case: Case, ms: float, base: float, limit: float, tile: TileConfig
) -> None:
    sizes = f"{tile.rows:4} x {tile.columns} x {tile.depth}, {tile.num_warps} warps"
    sizes += f", {tile.num_stages} stages, near {tile.near}"
    rate = f"{case.flops / ms / 1e9:6.1f} TF/s {limit / ms:5.2f}" if limit else ""
    print(f"  {launch:8} {sizes}: {ms * 1e3:8.1f} us {rate}, {base / ms:.3f} of now", flush=True)


def launches(run: partial[torch.Tensor], times: int = 9) -> list[tuple[str, float]]:
    """The kernels of one run in their order, and the median microseconds of each."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.name.endswith("_kernel")]
    events.sort(key=lambda event: event.time_range.start)
    each = len(events) // times
    return [
        (
            events[place].name,
            statistics.median(e.time_range.elapsed_us() for e in events[place::each]),
        )
        for place in range(each)
    ]

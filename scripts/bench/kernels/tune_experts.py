"""Times tile sizes of the expert kernels case by case and prints the best ones.

Kernels are compiled ahead by several processes into Triton's cache, since that takes longer than
to time them. Each launch is tuned on its own while the other keeps its present size.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

import torch

from gpu_kernels.expert_config import ExpertConfig, decode_config, prefill_config
from gpu_kernels.expert_decode import expert_decode
from gpu_kernels.grouped_gemm import grouped_experts
from gpu_kernels.tile_spec import TileConfig
from scripts.bench.kernels.expert_case import FORMATS, SHAPES, Case, make_layer
from scripts.bench.kernels.experts import decode_ms, prefill_ms

TUNED_TOKENS = (1, 8, 2048)
MAX_DECODE = 8
SHOWN = 4  # best sizes printed per launch


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
    """Rows, columns, depth, warps and stages to try."""
    if weights == "bf16":
        sizes = [
            *((128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 256, 64, 8, 4), (64, 128, 64, 4, 3)),
            *((64, 128, 64, 4, 4), (128, 64, 64, 8, 4), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4)),
        ]
    else:
        sizes = [
            *((64, 128, 64, 4, 2), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (64, 256, 64, 8, 3)),
            *((64, 128, 128, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (64, 128, 32, 4, 4)),
        ]
    return [TileConfig(*size) for size in sizes]


def tune() -> None:
    jobs = [
        (name, weights, num_tokens)
        for name, weights, num_tokens in product(SHAPES, FORMATS, TUNED_TOKENS)
    ]
    start = time.perf_counter()
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        compiles = [(*job, tile) for job in jobs if job[2] != 1 for tile in candidates(*job[1:])]
        list(pool.map(compile_tile, compiles))
    print(f"{torch.cuda.get_device_name()}: compiled in {time.perf_counter() - start:.0f} s")
    for name, weights in product(SHAPES, FORMATS):
        layer = make_layer(SHAPES[name], weights)
        for num_tokens in TUNED_TOKENS:
            print(f"{name} {weights} M={num_tokens}")
            tune_case(Case(SHAPES[name], layer, num_tokens), candidates(weights, num_tokens))
    print(f"{time.perf_counter() - start:.0f} s in all")


def candidates(weights: str, num_tokens: int) -> list[TileConfig]:
    return decode_tiles(weights) if num_tokens <= MAX_DECODE else prefill_tiles(weights)


def present(case: Case) -> ExpertConfig:
    """What the launchers use for the case now."""
    if case.num_tokens <= MAX_DECODE:
        return decode_config(case.layer, case.num_tokens, torch.bfloat16)
    pairs = case.num_tokens * case.shape.top_k
    return prefill_config(case.layer, pairs, torch.bfloat16)


def compile_tile(job: tuple[str, str, int, TileConfig]) -> None:
    """Fill Triton's cache: both launches of the case with this tile."""
    name, weights, num_tokens, tile = job
    case = Case(SHAPES[name], make_layer(SHAPES[name], weights), num_tokens)
    kernel = expert_decode if num_tokens <= MAX_DECODE else grouped_experts
    try:
        case.run(kernel, config=ExpertConfig(tile, tile))
        torch.cuda.synchronize()
    except Exception as error:  # too large for the device's shared memory, say
        print(f"{name} {weights} {tile}: {type(error).__name__}")


def tune_case(case: Case, tiles: list[TileConfig]) -> None:
    milliseconds: Callable[..., float]
    milliseconds = decode_ms if case.num_tokens <= MAX_DECODE else prefill_ms
    config = present(case)
    base = milliseconds(case, config=config)
    for launch in ("gate_up", "down"):
        times = []
        for tile in tiles:
            try:
                times.append((milliseconds(case, config=replace(config, **{launch: tile})), tile))
            except Exception as error:
                print(f"  {launch} {tile}: {type(error).__name__}")
        for ms, tile in sorted(times, key=lambda timed: timed[0])[:SHOWN]:
            print(f"  {launch:8} {ms * 1e3:8.1f} us, {base / ms:.3f} of the present speed: {tile}")

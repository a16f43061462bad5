"""Measures what a GPU does beside the CPU: reads host memory, launches kernels, hands work over.

Ordering: everything runs on torch's current stream or on a stream of its own that is awaited before
the next thing begins.
"""

import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from cpu_kernels.threads import WorkerPool
from gpu_kernels.few_rows import few_rows_linear
from gpu_kernels.host_memory import read_host
from offload.cold_share import ShareCosts
from offload.handoff_probe import choose_way, forced_way, probe
from offload.layer_rig import Layers, RigSetup, fed_pool, layer_rig, timed_graph
from offload.limits import GIGA
from offload.peaks import PINNED_BYTES, filled_arena, gpu_s, read_beside

RUNS = 3  # of reading side by side, 0.2 s each
KERNELS = 1000  # in one graph
SMALL = 512  # numbers of a row: half a megabyte of weights, which stay in the L2
REPLAYS = 20
BURST, BURSTS = 40, 200  # of launches, as many as a layer of a prompt takes; a third of a second
# a small model's layers: 12 x 5 experts of 12.6 MB, of the sizes that share_rates compiles for too
LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 12, 5, 4, 2048, 1024


def pull_rates(free_bytes: int, num_threads: int) -> dict[str, Any]:
    """How fast kernels read pinned memory, alone and while the workers read too."""
    pinned = torch.ones(PINNED_BYTES // 4, pin_memory=True)
    target = torch.empty(PINNED_BYTES // 4, device="cuda")

    def pull() -> None:
        read_host(pinned, target)

    alone_gbps = PINNED_BYTES / gpu_s(pull) / GIGA
    with WorkerPool(num_threads) as pool:
        arena = filled_arena(free_bytes)
        runs = [read_beside(pool, arena, pull) for _ in range(RUNS)]
    cpu_bps, pull_bps = max(runs, key=sum)
    return {
        "pull_gbps": alone_gbps,
        "beside_cpu_gbps": cpu_bps / GIGA,
        "beside_pull_gbps": pull_bps / GIGA,
    }


@torch.inference_mode()
def launch_s() -> float:
    """What one more small kernel costs in a graph, each reading what the one before has written.

    Started as those of a decode step are: before that one ends, where the device can.
    """
    first_TK, w_NK = _small_product()

    def chain() -> None:
        x_TK = first_TK
        for _ in range(KERNELS):
            x_TK = few_rows_linear(x_TK, w_NK)

    replay = timed_graph(chain, lambda work, is_done: work())
    return min(replay() for _ in range(REPLAYS)) / KERNELS


@torch.inference_mode()
def python_launch_s() -> float:
    """What Python takes to start a kernel, as in steps that are no graph: a median.

    No least time: on shared hosts, and where a core's sibling works, Python is slower by a half for
    moments at a time, and a prompt meets all of them.
    """
    x_TK, w_NK = _small_product()

    def burst() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(BURST):
            few_rows_linear(x_TK, w_NK)
        return (time.perf_counter() - started) / BURST

    burst()  # compiles
    return statistics.median(burst() for _ in range(BURSTS))


def _small_product() -> tuple[torch.Tensor, torch.Tensor]:
    """A row, and the weights that it is multiplied by."""
    room = torch.zeros((1 + SMALL, SMALL), dtype=torch.bfloat16, device="cuda")
    return room[:1], room[1:]


def hand_over_s(num_threads: int) -> float:
    """What a layer that has a cold expert takes longer, where a step chooses resident ones only."""
    some_cold, none_cold = (_layer_s(num_threads, setup) for setup in setups())
    return max(0.0, some_cold - none_cold)


def setups() -> tuple[RigSetup, RigSetup]:
    """Layers of whose experts one is cold, or none; chosen are resident ones."""
    layers = Layers(
        num_layers=LAYERS,
        num_experts=EXPERTS,
        num_resident=EXPERTS - 1,
        hidden=HIDDEN,
        width=WIDTH,
    )
    one_cold = RigSetup(layers, TOP_K, ShareCosts())
    return one_cold, replace(one_cold, layers=replace(layers, num_resident=EXPERTS))


def _layer_s(num_threads: int, setup: RigSetup) -> float:
    """Seconds of a layer's experts for one token."""
    way = choose_way(probe(), forced_way())
    with fed_pool(num_threads) as pool, layer_rig(setup, pool, way) as rig:
        return min(rig.seconds() for _ in range(REPLAYS))

"""How fast the workers and the link are where they share a decode step's cold experts: measured.

Not what plain reads give side by side: whoever is done first leaves memory to the other one, and
experts are read in another pattern. So the very layers of a decode step run with one division after
the other, and the fastest one is taken for what both sides can do.
"""

import statistics
from collections.abc import Callable, Sequence

from cpu_kernels.kernel_paths import Activations
from cpu_kernels.thread_count import CACHES
from cpu_kernels.topology import read_cache_bytes
from cpu_kernels.weight_kind import parse_kind
from offload.cold_share import ShareCosts, kept_rows
from offload.handoff_probe import choose_way, forced_way, probe
from offload.layer_rig import LayerRig, Layers, RigSetup, fed_pool, layer_rig
from offload.limits import GIGA
from offload.machine_rates import START_S, SharedRates
from offload.sample_experts import sample_bytes
from offload.units import GIB, MIB

# the others follow from bf16 and their own speed alone: Triton compiles each kind for 4 s and more
KERNELS: tuple[tuple[str, Activations], ...] = (("bf16", "f32"), ("w4g128", "int8"))
# 4 experts of 12.6 MB in bf16, as models with many experts have them cold; 2 of 176 MB
SIZES = ((2048, 1024, 4), (4096, 7168, 2))
LEAST_BYTES, MOST_BYTES = 512 * MIB, GIB  # of pinned memory, several times the caches
COARSE = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0)  # parts of the rows that the workers keep
FINE, REACH = 0.025, 3  # steps around the best of them
TURNS = 5
ALIKE = 0.01


def share_rates(num_threads: int, free_bytes: int) -> tuple[SharedRates, ...]:
    """Of every kernel and size; none where there is no memory for it."""
    return tuple(_rates(num_threads, setup) for setup in setups(free_bytes))


def setups(free_bytes: int) -> tuple[RigSetup, ...]:
    """What is measured: layers whose experts are all cold and all chosen."""
    if free_bytes // 3 < MOST_BYTES:
        return ()
    most = costs_of(COARSE[0])
    return tuple(
        RigSetup(_layers(kind, activations, *size), size[-1], most)
        for kind, activations in KERNELS
        for size in SIZES
    )


def _layers(kind: str, activations: Activations, hidden: int, width: int, chosen: int) -> Layers:
    weights = parse_kind(kind)
    expert_bytes = sample_bytes(weights, hidden, width)
    wanted = max(LEAST_BYTES, min(MOST_BYTES, CACHES * read_cache_bytes()))
    return Layers(
        num_layers=max(2, wanted // (chosen * expert_bytes)),
        num_experts=chosen,
        num_resident=0,
        hidden=hidden,
        width=width,
        kind=weights,
        activations=activations,
    )


def _rates(num_threads: int, setup: RigSetup) -> SharedRates:
    layers, chosen = setup.layers, setup.top_k
    way = choose_way(probe(), forced_way())
    with fed_pool(num_threads) as pool, layer_rig(setup, pool, way) as rig:
        rig.choose(nothing=True)
        idle_s = min(rig.seconds() for _ in range(TURNS))
        rig.choose(nothing=False)
        kept, seconds = best_part(lambda part: _layer_s(rig, part))
    expert_bytes = sample_bytes(layers.kind, layers.hidden, layers.width)
    group = layers.kind.group or 1
    table_N = kept_rows(chosen, layers.width, expert_bytes, costs_of(kept), group)
    part = int(table_N[chosen]) / (chosen * layers.width)
    gbps = chosen * expert_bytes / max(seconds - idle_s - START_S, 1e-9) / GIGA
    return SharedRates(
        kernel=f"{layers.kind.name}/{layers.activations}",
        expert_bytes=expert_bytes,
        cpu_gbps=part * gbps,
        link_gbps=(1 - part) * gbps,
    )


def _layer_s(rig: LayerRig, part: float) -> float:
    rig.share(costs_of(part))
    return rig.seconds()


def costs_of(part: float) -> ShareCosts:
    """By which the workers keep this part of the rows."""
    return ShareCosts(
        cpu_bytes_per_s=max(part, 1e-9),
        link_bytes_per_s=max(1 - part, 1e-9),
        cpu_start_s=0.0,
        link_start_s=0.0,
    )


def best_part(seconds: Callable[[float], float]) -> tuple[float, float]:
    """The part that takes least, and how long: the best of a few, then of those around it.

    Medians of TURNS, part after part in each turn: machines are slower for seconds at a time. Of
    parts that take as long but for ALIKE the largest: workers who are done last have memory to
    themselves by then, while a link that is full goes no faster alone.
    """
    first, _ = _best(seconds, COARSE)
    around = [round(first + FINE * n, 3) for n in range(-REACH, REACH + 1)]
    return _best(seconds, [part for part in around if COARSE[0] <= part <= 1])


def _best(seconds: Callable[[float], float], parts: Sequence[float]) -> tuple[float, float]:
    turns = [[seconds(part) for part in parts] for _ in range(TURNS)]
    medians = [statistics.median(times) for times in zip(*turns, strict=True)]
    good = min(medians) * (1 + ALIKE)
    return max((part, s) for part, s in zip(parts, medians, strict=True) if s <= good)

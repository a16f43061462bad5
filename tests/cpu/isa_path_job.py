"""Compact layers of a few paths, and their outputs: one process runs them per instruction set."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from expert_layers import F32, Step, Weights, random_step, random_weights, run

from cpu_kernels.expert_pool import ExpertPool

PATHS = ("bf16/f32", "w4g32z/int8", "w8g64/int8", "w4g128/f32", "bf16/bf16")
TOKENS = (1, 2, 11)  # every tile, whole and in part
HIDDEN, WIDTH = 147, 70


def layers(names: Iterable[str]) -> Iterator[tuple[str, Weights, Step]]:
    """The same in every process, whichever others it runs."""
    for name in names:
        rng = np.random.default_rng(PATHS.index(name))
        weights = random_weights(rng, name, hidden=HIDDEN, width=WIDTH)
        for count in TOKENS:
            step = random_step(rng, num_tokens=count, hidden=HIDDEN, num_experts=3, top_k=3)
            yield f"{name}, {count} tokens", weights, step


def outputs(names: Iterable[str]) -> dict[str, F32]:
    with ExpertPool(2) as pool:
        return {key: run(pool, weights, step) for key, weights, step in layers(names)}


def save(arrays: dict[str, F32], path: Path) -> None:
    np.savez(path, *arrays.values())


def load(names: Iterable[str], path: Path) -> dict[str, F32]:
    keys = [key for key, _, _ in layers(names)]
    with np.load(path) as arrays:
        return {key: arrays[f"arr_{n}"] for n, key in enumerate(keys)}


if __name__ == "__main__":
    save(outputs(sys.argv[2:]), Path(sys.argv[1]))

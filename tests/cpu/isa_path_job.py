"""Compact layers of four paths, and their outputs: one process runs them per instruction set."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from expert_layers import Step, Weights, random_step, random_weights, run

from cpu_kernels.expert_pool import ExpertPool

PATHS = ("bf16/f32", "w4g32z/int8", "w8g64/int8", "w4g128-bf16/f32")
TOKENS = (1, 2, 11)  # every tile, whole and in part
HIDDEN, WIDTH = 147, 70


def layers() -> Iterator[tuple[str, Weights, Step]]:
    """The same in every process."""
    rng = np.random.default_rng(20261121)
    for name in PATHS:
        weights = random_weights(rng, name, hidden=HIDDEN, width=WIDTH)
        for count in TOKENS:
            step = random_step(rng, num_tokens=count, hidden=HIDDEN, num_experts=3)
            yield f"{name} {count}", weights, step


def outputs() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    with ExpertPool(2) as pool:
        return {key: run(pool, weights, step) for key, weights, step in layers()}


def save(outputs: dict[str, np.ndarray], path: Path) -> None:  # type: ignore[type-arg]
    np.savez(path, **{key.replace("/", ":"): array for key, array in outputs.items()})


def load(path: Path) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    with np.load(path) as arrays:
        return {key.replace(":", "/"): arrays[key] for key in arrays}


if __name__ == "__main__":
    save(outputs(), Path(sys.argv[1]))

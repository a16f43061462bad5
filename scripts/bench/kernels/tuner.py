"""Tries launch configurations and tells which are fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from gpu_kernels import tuned
from gpu_kernels.tuned import Config
from scripts.bench.kernels.timing import median_ms

C = TypeVar("C")


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Within, ``kernel`` is launched with this configuration whatever the sizes."""
    table = tuned.TABLE[kernel]
    tuned.TABLE[kernel] = {family: [({}, config)] for family in tuned.TABLE[kernel]}
    try:
        yield
    finally:
        tuned.TABLE[kernel] = table


def try_each(configs: Iterable[C], measure: Callable[[C], float]) -> list[tuple[float, C]]:
    """(milliseconds, configuration) of all that fit the GPU, the fastest first."""
    results: list[tuple[float, C]] = []
    for config in configs:
        try:
            results.append((measure(config), config))
        except Exception as error:
            if "out of resource" not in str(error):
                raise
    return sorted(results, key=lambda result: result[0])


def try_all(
    kernel: str, prepare: Callable[[], Callable[[], object]], **choices: tuple[int, ...]
) -> list[tuple[float, Config]]:
    """``try_each`` of all combinations of the choices; ``prepare`` makes what is timed, anew."""

    def measure(config: Config) -> float:
        with forced(kernel, config):
            return median_ms(prepare())

    configs = [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]
    return try_each(configs, measure)

"""Tries launch configurations in place of those of the table, and tells which are fastest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpu_kernels import tuned
from gpu_kernels.tuned import Config
from scripts.bench.kernels.timing import median_ms


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Within, ``kernel`` is launched with this configuration whatever the sizes."""
    table = tuned.TABLE[kernel]
    tuned.TABLE[kernel] = {family: [({}, config)] for family in tuned.TABLE[kernel]}
    try:
        yield
    finally:
        tuned.TABLE[kernel] = table


def try_all(
    kernel: str, prepare: Callable[[], Callable[[], object]], **choices: tuple[int, ...]
) -> list[tuple[float, Config]]:
    """(milliseconds, configuration) of all combinations that fit the GPU, the fastest first.

    ``prepare`` makes what is timed, anew for each configuration.
    """
    results: list[tuple[float, Config]] = []
    for values in itertools.product(*choices.values()):
        config = dict(zip(choices, values, strict=True))
        with forced(kernel, config):
            try:
                results.append((median_ms(prepare()), config))
            except Exception as error:
                if "out of resource" not in str(error):
                    raise
    return sorted(results, key=lambda result: result[0])

"""One layer's cold experts in one step, where some of them are on disk (:mod:`offload.row_cache`).

Shapes: T tokens, K top-k.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from offload.row_cache import RowCache
from offload.worker_errors import workers_errors
from offload.worker_pool import WorkerPool


class DiskJob:
    """Begins to read when it is made, once no worker runs; ``submit`` must be called once."""

    def __init__(
        self, cache: RowCache, layer: int, arrays: tuple[np.ndarray, ...], is_cold_TK: np.ndarray
    ) -> None:
        """``arrays`` are those that the pool takes: x, ids, weights and out."""
        self._cache, self._layer, self._arrays = cache, layer, arrays
        self._runs = list(runs_of_tokens(arrays[1], is_cold_TK, cache.most))
        cache.begin(layer, self._runs[0][1])

    def submit(self, pool: WorkerPool, pool_layer: Any) -> None:
        """Give the pool one run of tokens after the other; it is left busy with the last one."""
        self._submit(pool, pool_layer, self._runs[0][0])
        for tokens, experts in self._runs[1:]:
            with workers_errors():
                pool.wait()
            self._cache.begin(self._layer, experts)
            self._submit(pool, pool_layer, tokens)

    def _submit(self, pool: WorkerPool, pool_layer: Any, tokens: slice) -> None:
        self._cache.finish()
        x, ids, weights, out = self._arrays
        if len(self._runs) > 1:
            x, ids, weights, out = x[tokens], ids[tokens], weights[tokens], out[tokens]
        with workers_errors():
            pool.submit(pool_layer, x, ids, weights, out)


def runs_of_tokens(
    ids_TK: np.ndarray, is_cold_TK: np.ndarray, most: int
) -> Iterator[tuple[slice, list[int]]]:
    """Cut a step into runs of tokens that need at most ``most`` cold experts each; they come too.

    A token alone may need no more than that. One run, as long as the step's experts are that few.
    """
    needed = np.unique(ids_TK[is_cold_TK]).tolist()
    if len(needed) <= most:
        yield slice(0, len(ids_TK)), needed
        return
    begin, together = 0, set[int]()
    for t, (ids, is_cold) in enumerate(zip(ids_TK, is_cold_TK, strict=True)):
        own = set(ids[is_cold].tolist())
        if len(together | own) > most:
            yield slice(begin, t), sorted(together)
            begin, together = t, set()
        together |= own
    yield slice(begin, len(ids_TK)), sorted(together)

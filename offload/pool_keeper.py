"""A model's worker pool, and another one when that has failed.

Ordering: one thread calls. A pool that is left may stand still in a job: a thread of its own closes
it, whenever that is possible, so nothing that it was bound to may be used again.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable

from cpu_kernels.expert_layer import ExpertLayer
from cpu_kernels.expert_pool import ExpertPool


class PoolKeeper:
    """``pool`` is the one to use now."""

    def __init__(self, start: Callable[[], ExpertPool]) -> None:
        self._start = start
        self.pool = start()

    @property
    def has_failed(self) -> bool:
        """Whether the pool in use can do nothing any more."""
        return self.pool.workers.has_failed

    def replace(self, layers: Iterable[ExpertLayer]) -> ExpertPool:
        """Leave the pool to itself, with its ``layers``, and start another."""
        left = (self.pool, list(layers))
        threading.Thread(target=_close, args=left, name="old-pool", daemon=True).start()
        self.pool = self._start()
        return self.pool

    def close(self) -> None:
        """End the pool in use."""
        self.pool.close()


def _close(pool: ExpertPool, layers: list[ExpertLayer]) -> None:
    with contextlib.suppress(Exception):  # what has failed was reported
        pool.close()

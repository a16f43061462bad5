"""A model's worker pool, and another one when that has failed.

Ordering: one thread calls. A pool that is left may stand still in a job: a thread of its own closes
it, which takes a while, and a worker may be late even then. It keeps what its jobs were bound to,
and nobody else may use that again.
"""

import contextlib
import threading
from collections.abc import Callable

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

    def replace(self) -> ExpertPool:
        """Leave the pool to itself and start another."""
        threading.Thread(target=_close, args=(self.pool,), name="old-pool", daemon=True).start()
        self.pool = self._start()
        return self.pool

    def close(self) -> None:
        """End the pool in use."""
        self.pool.close()


def _close(pool: ExpertPool) -> None:
    with contextlib.suppress(Exception):  # what has failed was reported
        pool.close()

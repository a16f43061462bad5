"""A pool that stands still is left behind and another one works at once."""

import threading
from typing import Any

import numpy as np

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.worker import JOB_HEADER
from offload.pool_keeper import PoolKeeper


def test_a_pool_in_the_middle_of_a_job_is_replaced() -> None:
    may_go = threading.Event()
    keeper = PoolKeeper(lambda: ExpertPool(1, caller_works=False))
    old, stage = keeper.pool, lambda *_: may_go.wait()
    record: Any = np.array([(0, 1)], JOB_HEADER)
    old.workers.ring(old.workers.add_job(record, stage))
    new = keeper.replace([])
    assert keeper.pool is new is not old
    new.wait()
    may_go.set()
    keeper.close()
    closing = [thread for thread in threading.enumerate() if thread.name == "old-pool"]
    for thread in closing:
        thread.join(10)
    assert not any(thread.is_alive() for thread in closing)

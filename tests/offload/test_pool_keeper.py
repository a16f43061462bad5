"""A pool that stands still is left behind and another one works at once."""

import threading

from cpu_kernels.expert_pool import ExpertPool
from offload.pool_keeper import PoolKeeper
from tests.workers import add_python_job


def test_a_pool_in_the_middle_of_a_job_is_replaced() -> None:
    may_go = threading.Event()
    keeper = PoolKeeper(lambda: ExpertPool(1, caller_works=False))
    old = keeper.pool
    old.workers.ring(add_python_job(old.workers, lambda *_: may_go.wait(60)))
    new = keeper.replace()
    assert keeper.pool is new is not old
    new.wait()
    may_go.set()
    keeper.close()
    closing = [thread for thread in threading.enumerate() if thread.name == "old-pool"]
    for thread in closing:
        thread.join(10)
    assert not any(thread.is_alive() for thread in closing)

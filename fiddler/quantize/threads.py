"""Threads that quantise experts side by side: as many as cores, unless memory is short of them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from fiddler.models.config import ModelConfig
from fiddler.quantize.expert import Method
from offload.hardware import probe

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2  # experts that are under way or wait to be taken, for each thread


def worker_bytes(config: ModelConfig, method: Method) -> int:
    """Most memory that one expert takes while it is quantised.

    Its weights in float32, codes and restored weights come to three copies; GPTQ holds the Hessian,
    and its factor, inverse and their operands in float64.
    """
    largest = max(config.hidden_size, config.expert_size)
    return 12 * config.expert_numel + (36 * largest**2 if method == "gptq" else 0)


def num_workers(config: ModelConfig, method: Method) -> int:
    """Threads for this machine: half of the free memory at most, and at least one."""
    machine = probe("cpu")
    fitting = machine.ram_available_bytes // 2 // worker_bytes(config, method)
    return max(1, min(machine.physical_cores, config.num_experts, fitting))


class Threads:
    """Some threads that are given work in order."""

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self._count = pool, count

    def in_order(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Results in the order of ``items``, few of them waiting; the first error ends it."""
        waiting: deque[Future[R]] = deque()
        most = AHEAD * self._count
        try:
            for item in items:
                waiting.append(self._pool.submit(work, item))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def quantizing_threads(count: int) -> Iterator[Threads]:
    """``count`` threads that share the cores out to torch: each uses its part.

    torch gives the last number that any thread has set to threads that come later: so the caller's
    is set once more at the end.
    """
    before = torch.get_num_threads()
    share = max(1, before // count)
    try:
        with ThreadPoolExecutor(
            count, "fiddler-quantize", lambda: torch.set_num_threads(share)
        ) as pool:
            yield Threads(pool, count)
    finally:
        torch.set_num_threads(before)

"""Seeded normal weights for a configuration without a checkpoint: to measure, not to talk to.

A number depends on seed, tensor name and position alone, whatever the dtype, device or threads.
"""

import functools
import hashlib
import os
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cpu_kernels.bf16 import U16
from cpu_kernels.seeded_table import LEVELS, fill_from_table
from fiddler.models.config import ModelConfig, WeightNames

# Large enough to hide the hand-over to a thread (20 us beside 5 ms), small enough to share a large
# matrix evenly. Experts are filled by several threads anyway.
_BLOCK = 1 << 22


class DummySource:
    """Weights under which activations and logits stay near unit variance and tokens stay apart.

    Projections have variance 1 / fan-in, norm weights are 1 + 0.1 n, biases 0.1 n with normal n.
    What a block adds to the residual stream is small as in GPT-2: at full size attention's averages
    pile up until all tokens look alike and choose the same experts.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._seed = seed
        # a tied embedding is the head too and must keep the logits near one
        self._unit_embed = "" if config.tie_embeddings else config.names.embed
        self._added_gain = (2 * config.num_layers) ** -0.5
        self._added = tuple(_last_part(name) for name in _added_names(config.names))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a new float32 tensor on the CPU."""
        out = torch.empty(shape)
        self.fill_(out, name)
        return out

    def bits(self, name: str, shape: tuple[int, ...], rows: slice) -> U16:
        """Bits of some rows of a matrix in bfloat16, on the calling thread alone."""
        cols = shape[1]
        out = np.empty((rows.stop - rows.start, cols), np.uint16)
        table = _table(*self.moments(name, shape), torch.bfloat16)
        fill_from_table(out.reshape(-1), table, self.key(name), rows.start * cols)
        return out

    def forget(self, name: str) -> None:
        """Nothing is kept."""

    def fill_(self, out: Tensor, name: str) -> None:
        """Generate in place, on all cores; an accelerator's tensor goes through one host copy."""
        host = out if out.device.type == "cpu" else torch.empty_like(out, device="cpu")
        assert host.is_contiguous()
        mean, std = self.moments(name, tuple(out.shape))
        table = _table(mean, std, host.dtype)
        bits = torch.int32 if table.itemsize == 4 else torch.int16
        _fill(host.view(-1).view(bits).numpy().view(table.dtype), table, self.key(name))
        if host is not out:
            out.copy_(host)

    def moments(self, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of a tensor's numbers."""
        if name == self._unit_embed:
            return 0.0, 1.0
        if len(shape) == 2:
            gain = self._added_gain if name.endswith(self._added) else 1.0
            return 0.0, gain * shape[1] ** -0.5
        return (0.0 if name.endswith(".bias") else 1.0), 0.1

    def key(self, name: str) -> np.uint64:
        """What the draws of a name start from."""
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        return np.uint64(int.from_bytes(digest, "little"))


def _added_names(names: WeightNames) -> tuple[str, ...]:
    """Return the projections whose result is added to the residual stream."""
    written = (f"{names.o}.weight", names.expert_down, names.shared_down, names.dense_down)
    return tuple(name for name in written if name)


def _last_part(name: str) -> str:
    """Return a name's end after its last placeholder: enough to know its kind."""
    return name.rpartition("}")[2]


def _fill(out: np.ndarray, table: np.ndarray, key: np.uint64) -> None:
    starts = range(0, out.size, _BLOCK)
    if len(starts) == 1:
        fill_from_table(out, table, key, 0)
        return
    jobs = [
        _pool().submit(fill_from_table, out[start : start + _BLOCK], table, key, start)
        for start in starts
    ]
    for job in jobs:
        job.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="dummy-weights")


@functools.cache
def _table(mean: float, std: float, dtype: torch.dtype) -> np.ndarray:
    """Return the bit patterns of ``LEVELS`` equally likely numbers of the normal distribution."""
    normal = statistics.NormalDist()
    quantiles = [normal.inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS)]
    numbers = (torch.tensor(quantiles, dtype=torch.float64) * std + mean).to(dtype)
    if numbers.itemsize == 4:
        return numbers.view(torch.int32).numpy().view(np.uint32)
    return numbers.view(torch.int16).numpy().view(np.uint16)

"""The CPU side of an MoE layer: routed experts' MLPs, computed by a pool of worker threads.

T tokens, H hidden, I expert width, E experts, P (expert, token, weight) pairs.
"""

import weakref
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels.compiled import DTYPES, kernels
from cpu_kernels.expert_kernels import JOB
from cpu_kernels.expert_reference import F32, U16, Integers
from cpu_kernels.sort_pairs import OUT_OF_RANGE
from cpu_kernels.threads import WorkerPool, default_num_threads, num_physical_cores

FLOAT = (np.dtype(np.float32),)
INTEGERS = (np.dtype(np.int64), np.dtype(np.int32))


class SortedPairs:
    """Room for a layer's pairs in the order that the kernels want; kept from layer to layer."""

    def __init__(self, *, num_experts: int, num_pairs: int) -> None:
        self._num_experts, self._num_pairs = num_experts, num_pairs
        expert, start = np.empty(num_experts, np.int64), np.empty(num_experts + 1, np.int64)
        token, weight = np.empty(num_pairs, np.int64), np.empty(num_pairs, np.float32)
        self.arrays = (expert, start, token, weight)
        self.addresses = tuple(array.ctypes.data for array in self.arrays)

    def has_room(self, num_experts: int, num_pairs: int) -> bool:
        return self._num_experts >= num_experts and self._num_pairs >= num_pairs


class ExpertPool:
    """Worker threads that compute one layer's routed experts at a time.

    Ordering: call it from one thread. Arrays given to submit belong to the workers until wait has
    returned: neither write them nor read ``out_TH``.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        """Start the workers; None: a number that leaves room for Python and the GPU driver.

        Compiles the kernels if no start before did (:func:`cpu_kernels.compiled.needs_compile`).
        """
        if num_threads is None:
            num_threads = default_num_threads(num_physical_cores())
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, not {num_threads}")
        self._kernels = kernels()
        self._jobs = np.zeros(1, JOB)
        self._pool = WorkerPool(self._kernels, self._jobs, num_threads)
        self._arrays: tuple[npt.NDArray[Any], ...] = ()  # alive while the workers hold addresses
        self._pairs = SortedPairs(num_experts=1, num_pairs=1)
        self._act = aligned_floats(1)
        self._finalizer = weakref.finalize(self, self._pool.close)

    @property
    def num_threads(self) -> int:
        return self._pool.num_threads

    def submit(
        self,
        w13_EFH: U16 | F32,
        w2_EHI: U16 | F32,
        x_TH: F32,
        expert_P: Integers,
        token_P: Integers,
        weight_P: F32,
        out_TH: F32,
    ) -> None:
        """Start a layer; returns at once (a layer still running is waited for first).

        out[t] = sum over t's pairs of weight * down(silu(gate(x[t])) * up(x[t])), zeros for a token
        without a pair; float32 sums in an order that depends on neither the threads nor the other
        tokens. ``w13_EFH`` holds I gate rows, then I up rows. Weights are uint16 (bf16 bits) or
        float32. All C-contiguous. Denormals count as 0. ValueError if something does not fit.
        """
        _check(w13_EFH, w2_EHI, x_TH, expert_P, token_P, weight_P, out_TH)
        self.wait()
        num_experts, width, num_pairs = len(w2_EHI), w2_EHI.shape[2], len(expert_P)
        if not self._pairs.has_room(num_experts, num_pairs):
            self._pairs = SortedPairs(num_experts=num_experts, num_pairs=num_pairs)
        if self._act.size < num_pairs * width:
            self._act = aligned_floats(num_pairs * width)
        num_routed = self._kernels.sort_pairs(
            np.ascontiguousarray(expert_P, np.int64),
            np.ascontiguousarray(token_P, np.int64),
            np.ascontiguousarray(weight_P),
            *(num_experts, len(x_TH)),
            *self._pairs.arrays,
        )
        if num_routed == OUT_OF_RANGE:
            raise ValueError("an expert or token id is out of range")
        self._arrays = (w13_EFH, w2_EHI, x_TH, out_TH, self._act)
        addresses = (array.ctypes.data for array in self._arrays)
        sizes = (num_routed, *x_TH.shape, width, w13_EFH.dtype == np.uint16)
        self._jobs[0] = (*addresses, *self._pairs.addresses, *sizes, 0, 0, 0)
        self._pool.start()

    def read(self, arena: npt.NDArray[Any], num_readers: int) -> int:
        """Read ``arena`` once with the first ``num_readers`` workers: what memory can deliver.

        Returns the exclusive or of its int64 words when all is read. ValueError unless the arena is
        C-contiguous, whole words long, and the pool has as many workers.
        """
        if not arena.flags.c_contiguous or arena.nbytes % 8:
            raise ValueError("the arena must be C-contiguous and a multiple of 8 bytes")
        if not 1 <= num_readers <= self.num_threads:
            raise ValueError(f"num_readers must be 1 to {self.num_threads}, not {num_readers}")
        self.wait()
        found = np.zeros(self.num_threads, np.int64)
        self._jobs[0] = 0
        job = self._jobs[0]
        job["num_readers"], job["out"] = num_readers, found.ctypes.data
        job["read"], job["read_words"] = arena.ctypes.data, arena.nbytes // 8
        self._arrays = (arena, found)
        self._pool.start()
        self.wait()
        return int(np.bitwise_xor.reduce(found))

    def wait(self) -> None:
        """Return when the submitted layer is done; raise the exception of a worker that failed."""
        self._pool.wait()
        self._arrays = ()

    def close(self) -> None:
        """Let a submitted layer end, stop and join the threads. Safe to call again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def aligned_floats(size: int) -> F32:
    """Uninitialised float32 at a multiple of 64 bytes: a 512-bit load touches one cache line."""
    room = np.empty(size + 16, np.float32)
    first = -(room.ctypes.data // 4) % 16
    return room[first : first + size]


def _check(
    w13_EFH: U16 | F32,
    w2_EHI: U16 | F32,
    x_TH: F32,
    expert_P: Integers,
    token_P: Integers,
    weight_P: F32,
    out_TH: F32,
) -> None:
    """ValueError unless shapes, types and layout are as :meth:`ExpertPool.submit` says."""
    if w2_EHI.ndim != 3 or x_TH.ndim != 2:
        raise ValueError(f"w2 must be [E, H, I] and x [T, H], not {w2_EHI.shape} and {x_TH.shape}")
    num_experts, hidden, width = w2_EHI.shape
    pairs = (expert_P.size,)
    _check_array("w2", w2_EHI, w2_EHI.shape, DTYPES)
    _check_array("w13", w13_EFH, (num_experts, 2 * width, hidden), (w2_EHI.dtype,))
    _check_array("x", x_TH, (len(x_TH), hidden), FLOAT)
    _check_array("out", out_TH, x_TH.shape, FLOAT)
    _check_array("weight", weight_P, pairs, FLOAT)
    _check_array("expert", expert_P, pairs, INTEGERS)
    _check_array("token", token_P, pairs, INTEGERS)
    if not out_TH.flags.writeable:
        raise ValueError("out must be writable")


def _check_array(
    name: str,
    array: npt.NDArray[Any],
    shape: tuple[int, ...],
    dtypes: tuple[np.dtype[Any], ...],
) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, not {array.shape}")
    if array.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, not {array.dtype}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous")

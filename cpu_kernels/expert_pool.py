"""The CPU side of MoE layers: routed experts' MLPs, computed by a pool of worker threads.

T tokens, S choices of a token (top k), H hidden, I expert width, E experts held.
"""

from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import F32
from cpu_kernels.checks import FLOAT, ID, check_array
from cpu_kernels.compiled import stage_needs_compile
from cpu_kernels.expert_layer import I32, ExpertLayer, stage_maker
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import PATHS, Activations, path_number
from cpu_kernels.scratch import scratch_sizes, worker_stride
from cpu_kernels.threads import StageError, WorkerPool
from cpu_kernels.weight_kind import WeightKind

LINE = 64  # bytes of a cache line
# Of the slowest worker that is not taken to stand still. A piece gives no sign of life, and a
# worker's first one may be a third of its products (half of gate and up). 4,096 tokens of a layer
# of Mixtral-8x22B are 2.5e12: a lone worker's first piece takes 16 s with AVX2 (50e9 a second of an
# EPYC core), 70 s without (w4g128: 12e9), and longer on a core that others use.
SLOW_PRODUCTS_PER_S = 2e9


class ExpertPool:
    """Worker threads that compute one layer's routed experts at a time.

    Ordering: call it from one thread. Arrays given to submit belong to the workers until wait has
    returned: neither write them nor read ``out_TH``.
    """

    def __init__(self, num_threads: int | None = None, **options: Any) -> None:
        """Start the workers; arguments as :class:`cpu_kernels.threads.WorkerPool`."""
        self.workers = WorkerPool(num_threads, **options)
        self._scratch: dict[str, npt.NDArray[np.uint8]] = {}

    @property
    def num_threads(self) -> int:
        return self.workers.num_threads

    def add_layer(
        self,
        experts: Experts,
        *,
        activations: Activations = "f32",
        place_of: I32 | None = None,
        columns_from: int | None = None,
    ) -> ExpertLayer:
        """A layer for :meth:`submit`; compiles its kernels if no start before did.

        ``activations``: what x and the intermediate are rounded to before each product. "f32" is
        exact; "bf16" (bf16 and bf12 weights) and "int8" (rounded weights, a scale per token and
        group) are faster for more than one token. ``place_of``: the place of expert e among
        ``experts``, -1 if it is not there and its choices are to be left out; None: ids are places.
        The array is read at each step, so it may change while the layer does not run.
        ``columns_from``: experts with that many tokens of a step or more are computed by tiles that
        read a weight once for 16 of them (bf12 weights with bf16 activations, or bf16 ones whose
        sizes are multiples of 32); None: never. ValueError if the weights cannot be had with these
        activations, or not computed so.
        """
        self.wait()
        layer = ExpertLayer(experts, activations, place_of, columns_from, self.workers.words)
        layer.number = self.workers.add_job(layer.record, owner=layer)
        return layer

    def remove_layer(self, layer: ExpertLayer) -> None:
        """Forget a layer; one that runs is waited for, and its complaint raised by then."""
        try:
            self.wait()
        finally:
            self.workers.remove_job(layer.number)

    def bind(
        self,
        layer: ExpertLayer,
        x_TH: F32,
        ids_TS: I32,
        weights_TS: F32,
        out_TH: F32,
        kept_N: I32 | None = None,
    ) -> None:
        """Give a layer that does not run its arrays; see :meth:`submit`.

        The n distinct experts of a
        step lie end to end in the order of their places, and only the first ``kept_N[n]`` rows of
        gate and up and columns of w2 are computed; N = E + 1, whole experts and of one more a
        multiple of a packed kind's group. None: all. The array is read at each step. ValueError if
        something does not fit, as biases and columns do not.
        """
        step = (x_TH, ids_TS, weights_TS, out_TH)
        is_bound = len(layer.step) == 4 and all(
            a is b for a, b in zip(step, layer.step, strict=True)
        )
        if is_bound and kept_N is layer.kept:
            return
        _check_step(layer, *step)
        if kept_N is not None:
            _check_kept(layer, kept_N)
        layer.step, layer.kept = step, kept_N
        num_tokens, top_k = ids_TS.shape
        record = layer.record[0]
        record["x"], record["ids"], record["weights"], record["out"] = map(_address, step)
        record["num_tokens"], record["top_k"] = num_tokens, top_k
        record["kept"] = 0 if kept_N is None else _address(kept_N)
        self._bind_scratch(layer, num_tokens, num_tokens * top_k)

    def submit(
        self, layer: ExpertLayer, x_TH: F32, ids_TS: I32, weights_TS: F32, out_TH: F32
    ) -> None:
        """Start a layer; returns at once (a layer still running is waited for first).

        out[t] = sum over t's choices of weight * down(f(gate(x[t]), up(x[t]))), zeros for a token
        without one; float32 sums in an order that depends on neither the threads nor the other
        tokens, but on whether an expert has so many that it is computed by columns. All
        C-contiguous; ids are int32, -1 is no choice. Denormals count as 0. ValueError if something
        does not fit; an id out of range is found later, by wait.
        """
        self.wait()
        self.bind(layer, x_TH, ids_TS, weights_TS, out_TH)
        self.workers.ring(layer.number, piece_s=self._piece_s(layer, ids_TS.size))

    def wait(self) -> None:
        """Return when the submitted layer is done; raise the exception of a worker that failed.

        ValueError if an expert id was out of range; ``out_TH`` is then all zeros.
        """
        try:
            self.workers.wait()
        except StageError as error:
            raise ValueError("an expert id is out of range") from error

    def close(self) -> None:
        """Let a submitted layer end, stop and join the threads. Safe to call again."""
        self.workers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _piece_s(self, layer: ExpertLayer, num_pairs: int) -> float:
        """How long a slow worker is busy with its share of a layer; a piece is less."""
        products = 3 * num_pairs * layer.experts.hidden * layer.experts.width
        return products / (self.num_threads * SLOW_PRODUCTS_PER_S)

    def _bind_scratch(self, layer: ExpertLayer, num_tokens: int, num_pairs: int) -> None:
        record, path = layer.record[0], layer.path
        record["worker_stride"] = worker_stride(layer.experts.num_experts, num_pairs)
        sizes = scratch_sizes(
            layer.sizes, num_tokens=num_tokens, num_pairs=num_pairs, num_threads=self.num_threads
        )
        for name, num_bytes in sizes.items():
            layer.scratch[name] = self._room(name, num_bytes)
            record[name] = -(-_address(layer.scratch[name]) // LINE) * LINE
        if path.activations == "f32" and not path.kind.is_packed:
            record["x_rows"] = record["x"]
        if path.activations != "int8":
            record["act"] = record["act_rows"]

    def _room(self, name: str, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Scratch of at least that size after a line's start, the same for all layers.

        Where it has to grow, layers that were bound before keep the smaller one.
        """
        room = self._scratch.get(name)
        if room is None or room.size < num_bytes + LINE:
            room = self._scratch[name] = np.zeros(2 * num_bytes + LINE, np.uint8)
        return room


def needs_compile(kind: WeightKind, activations: Activations = "f32") -> bool:
    """Whether add_layer will compile for these weights; see :mod:`cpu_kernels.compiled`."""
    number = path_number(kind, activations)
    return stage_needs_compile(stage_maker(PATHS[number]), number)


def aligned_floats(size: int) -> F32:
    """Uninitialised float32 at a multiple of 64 bytes: a 512-bit load touches one cache line."""
    room = np.empty(size + 16, np.float32)
    first = -(room.ctypes.data // 4) % 16
    return room[first : first + size]


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _check_step(layer: ExpertLayer, x_TH: F32, ids_TS: I32, weights_TS: F32, out_TH: F32) -> None:
    if ids_TS.ndim != 2:
        raise ValueError(f"ids must be [T, S], not {ids_TS.shape}")
    x_shape = (len(ids_TS), layer.experts.hidden)
    check_array("x", x_TH, x_shape, FLOAT)
    check_array("ids", ids_TS, ids_TS.shape, ID)
    check_array("weights", weights_TS, ids_TS.shape, FLOAT)
    check_array("out", out_TH, x_shape, FLOAT)
    if not out_TH.flags.writeable:
        raise ValueError("out must be writable")
    if np.may_share_memory(x_TH, out_TH):  # parts of out are written while others still read x
        raise ValueError("out must not share memory with x")


def _check_kept(layer: ExpertLayer, kept_N: I32) -> None:
    check_array("kept", kept_N, (layer.experts.num_experts + 1,), ID)
    has_biases = layer.experts.mlp.b13_EF is not None or layer.experts.mlp.b2_EH is not None
    if has_biases or layer.columns_from:
        raise ValueError("experts with biases, or computed by columns, must be computed whole")
    kind, width = layer.experts.kind, layer.experts.width
    group = kind.group if kind.is_packed else 1
    is_known_N = (kept_N >= 0) & (kept_N <= width * np.arange(len(kept_N)))
    if not (is_known_N & (kept_N % width % group == 0)).all():
        raise ValueError(f"kept must be experts of {width} rows and multiples of {group}")

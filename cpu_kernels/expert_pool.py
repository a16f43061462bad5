"""The CPU side of MoE layers: routed experts' MLPs, computed by a pool of worker threads.

T tokens, S choices of a token (top k), H hidden, I expert width, E experts held.
"""

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cpu_kernels.activations import ACTIVATIONS
from cpu_kernels.checks import FLOAT, ID, check_array
from cpu_kernels.compiled import stage_address, stage_needs_compile
from cpu_kernels.dense_stage import make_dense_stage
from cpu_kernels.dot_tile import x_bytes
from cpu_kernels.expert_job import JOB, ROOM
from cpu_kernels.expert_reference import F32
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import PATHS, Activations, KernelPath, path_number
from cpu_kernels.packed_stage import make_packed_stage
from cpu_kernels.routes import COUNTS
from cpu_kernels.threads import StageError, WorkerPool
from cpu_kernels.weight_kind import WeightKind

if TYPE_CHECKING:
    from cpu_kernels.onednn import HandOver

I32 = npt.NDArray[np.int32]
LINE = 64  # bytes of a cache line


class ExpertLayer:
    """One layer of a pool: its job's record and what that points to. Made by add_layer."""

    def __init__(self, experts: Experts, path: KernelPath, place_of: I32 | None) -> None:
        self.experts = experts
        self.path = path
        self.place_of = place_of
        self.record = np.zeros(1, JOB)
        self.number = 0
        self.step: tuple[npt.NDArray[Any], ...] = ()  # x, ids, weights and out of the last step
        self.scratch: dict[str, npt.NDArray[np.uint8]] = {}  # alive while the record points to it
        self.hand_over: HandOver | None = None

    @property
    def num_ids(self) -> int:
        """Experts that ids may name."""
        return self.experts.num_experts if self.place_of is None else len(self.place_of)

    def row_sizes(self) -> tuple[int, int, int]:
        """Bytes of a prepared row of x and of act, and elements of a float32 row of act."""
        experts, kind = self.experts, self.path.kind
        if not kind.is_packed:
            size = x_bytes(self.path)
            return experts.hidden * size, experts.width * size, 0
        group = kind.group
        x_groups, act_groups = -(-experts.hidden // group), -(-experts.width // group)
        if self.path.activations == "f32":
            return x_groups * group * 4, act_groups * group * 4, act_groups * group
        return x_groups * (group + 8), act_groups * (group + 8), experts.width


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
        hand_over: int | None = None,
    ) -> ExpertLayer:
        """A layer for :meth:`submit`; compiles its kernels if no start before did.

        ``activations``: what x and the intermediate are rounded to before each product. "f32" is
        exact; "bf16" (bf16 weights) and "int8" (packed weights, a scale per token and group) are
        faster for more than one token. ``place_of``: the place of expert e among ``experts``, -1 if
        it is not there and its choices are to be left out; None: ids are places. ``hand_over``:
        experts with that many tokens of a step are computed by torch (bf16 weights with bf16
        activations, whose products are then rounded to bf16 too, or f32 weights); None: never.
        ValueError if the weights cannot be had with these activations, or not be handed over.
        """
        number = path_number(experts.kind, activations)
        layer = ExpertLayer(experts, PATHS[number], place_of)
        record, mlp = layer.record[0], experts.mlp
        record["stage"] = stage_address(_stage_maker(experts.kind), number)
        record["num_phases"] = {"f32": 3 if experts.kind.is_packed else 2, "bf16": 3, "int8": 4}[
            activations
        ]
        for name in ("w13", "w13_stride", "w2", "w2_stride", "num_experts", "hidden", "width"):
            record[name] = getattr(experts, name)
        for name, bias in (("b13", mlp.b13_EF), ("b2", mlp.b2_EH)):
            record[name] = 0 if bias is None else bias.ctypes.data
        if place_of is not None:
            check_array("place_of", place_of, (place_of.size,), ID)
            if place_of.size and not -1 <= place_of.min() <= place_of.max() < experts.num_experts:
                raise ValueError(f"place_of must be -1 to {experts.num_experts - 1}")
            record["place_of"] = place_of.ctypes.data
        record["num_ids"] = layer.num_ids
        record["activation"] = ACTIVATIONS.index(mlp.activation)
        record["limit"], record["alpha"] = mlp.limit, mlp.alpha
        record["error"] = self.workers.error_address
        record["x_row_bytes"], record["act_row_bytes"], record["act_cols"] = layer.row_sizes()
        layer.number = self.workers.add_job(layer.record)
        if hand_over is not None:
            from cpu_kernels.onednn import HandOver  # takes seconds to import

            self.wait()
            layer.hand_over = HandOver(self.workers, layer, hand_over)
        return layer

    def remove_layer(self, layer: ExpertLayer) -> None:
        """Forget a layer that does not run."""
        self.wait()
        self.workers.remove_job(layer.number)
        if layer.hand_over is not None:
            self.workers.remove_job(layer.hand_over.number)

    def bind(
        self, layer: ExpertLayer, x_TH: F32, ids_TS: I32, weights_TS: F32, out_TH: F32
    ) -> None:
        """Give a layer that does not run its arrays; see :meth:`submit`.

        Who rings ``layer.number`` without submit hands no expert over.
        """
        step = (x_TH, ids_TS, weights_TS, out_TH)
        if len(layer.step) == 4 and all(a is b for a, b in zip(step, layer.step, strict=True)):
            return
        _check_step(layer, *step)
        layer.step = step
        num_tokens, top_k = ids_TS.shape
        record = layer.record[0]
        record["x"], record["ids"], record["weights"], record["out"] = map(_address, step)
        record["num_tokens"], record["top_k"] = num_tokens, top_k
        self._bind_scratch(layer, num_tokens, num_tokens * top_k)

    def submit(
        self, layer: ExpertLayer, x_TH: F32, ids_TS: I32, weights_TS: F32, out_TH: F32
    ) -> None:
        """Start a layer; returns at once (a layer still running is waited for first).

        out[t] = sum over t's choices of weight * down(f(gate(x[t]), up(x[t]))), zeros for a token
        without one; float32 sums in an order that depends on neither the threads nor the other
        tokens, except that experts which are handed over come last. All C-contiguous; ids are
        int32, -1 is no choice. Denormals count as 0. ValueError if something does not fit; an id
        out of range is found later, by wait.
        """
        self.wait()
        self.bind(layer, x_TH, ids_TS, weights_TS, out_TH)
        handed = layer.hand_over
        self.workers.ring(layer.number if handed is None else handed.take(self._room))

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

    def _bind_scratch(self, layer: ExpertLayer, num_tokens: int, num_pairs: int) -> None:
        record, path = layer.record[0], layer.path
        x_row_bytes, act_row_bytes, act_cols = layer.row_sizes()
        stride = ROOM.itemsize + 8 * routes_words(layer.experts.num_experts, num_pairs)
        record["worker_stride"] = stride
        sizes = {
            "workers": stride * self.num_threads,
            "x_rows": num_tokens * x_row_bytes,
            "act_rows": num_pairs * act_row_bytes,
            "act": num_pairs * act_cols * 4,
        }
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
    return stage_needs_compile(_stage_maker(kind), path_number(kind, activations))


def _stage_maker(kind: WeightKind) -> Callable[[int], Any]:
    return make_packed_stage if kind.is_packed else make_dense_stage


def routes_words(num_experts: int, num_pairs: int) -> int:
    """int64 that a worker's routes take, whole cache lines; see :mod:`cpu_kernels.routes`."""
    words = COUNTS + 2 * num_experts + 1 + 2 * num_pairs
    return -(-words // 8) * 8


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

"""One layer of an expert pool: the record of its job, and what that points to."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels import dense_stage, lossless_stage, packed_stage
from cpu_kernels.activations import ACTIVATIONS
from cpu_kernels.checks import ID, check_array
from cpu_kernels.column_panels import UNIT, may_use_columns
from cpu_kernels.compiled import stage_address
from cpu_kernels.expert_job import JOB
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import PATHS, Activations, KernelPath, path_number
from cpu_kernels.scratch import LayerSizes
from cpu_kernels.worker import ERROR, TAKEN

I32 = npt.NDArray[np.int32]


class ExpertLayer:
    """Made by :meth:`cpu_kernels.expert_pool.ExpertPool.add_layer`, which has the arguments."""

    def __init__(
        self,
        experts: Experts,
        activations: Activations,
        place_of: I32 | None,
        columns_from: int | None,
        words: npt.NDArray[np.int64],
    ) -> None:
        number = path_number(experts.kind, activations)
        self.experts = experts
        self.path = PATHS[number]
        if place_of is not None:
            _check_places(place_of, experts.num_experts)
        self.place_of = place_of
        self.number = 0  # of its job
        self.step: tuple[npt.NDArray[Any], ...] = ()  # x, ids, weights and out of the last step
        self.kept: I32 | None = None  # of that step; see ExpertPool.bind
        self.scratch: dict[str, npt.NDArray[np.uint8]] = {}  # alive while the record points to it
        self.columns_from = self._checked_columns(columns_from)
        self.sizes = LayerSizes(
            self.path, experts.hidden, experts.width, experts.num_experts, self.columns_from
        )
        self.record = np.zeros(1, JOB)
        self._fill(self.record[0], number, words)

    @property
    def num_ids(self) -> int:
        """Experts that ids may name."""
        return self.experts.num_experts if self.place_of is None else len(self.place_of)

    def _checked_columns(self, columns_from: int | None) -> int:
        """Pairs of an expert that is computed by columns; 0: none is."""
        if columns_from is None:
            return 0
        hidden, width = self.experts.hidden, self.experts.width
        if not may_use_columns(self.path, hidden, width):
            raise ValueError(
                f"{self.path.name} experts of {hidden} x {width} cannot be computed by columns, "
                "which takes bf16 activations and bf12 weights, or bf16 ones and multiples of "
                f"{UNIT}"
            )
        if columns_from < 1:
            raise ValueError(f"columns_from must be at least 1 token, not {columns_from}")
        return columns_from

    def _num_phases(self) -> int:
        has_columns = self.columns_from > 0
        if not self.path.kind.is_packed:
            return dense_stage.num_phases(self.path, has_columns=has_columns)
        if stage_maker(self.path) is lossless_stage.make_lossless_stage:
            return lossless_stage.num_phases(has_columns=has_columns)
        return packed_stage.num_phases(self.path)

    def _fill(self, record: np.void, number: int, words: npt.NDArray[np.int64]) -> None:
        """Write what does not change from step to step."""
        experts, mlp = self.experts, self.experts.mlp
        record["stage"] = stage_address(stage_maker(self.path), number)
        record["num_phases"] = self._num_phases()
        record["columns_from"] = self.columns_from
        for name in ("w13", "w13_stride", "w2", "w2_stride", "num_experts", "hidden", "width"):
            record[name] = getattr(experts, name)
        for name, array in (
            ("b13", mlp.b13_EF),
            ("b2", mlp.b2_EH),
            ("place_of", self.place_of),
        ):
            record[name] = 0 if array is None else array.ctypes.data
        record["num_ids"] = self.num_ids
        record["activation"] = ACTIVATIONS.index(mlp.activation)
        record["limit"], record["alpha"] = mlp.limit, mlp.alpha
        record["error"], record["taken"] = words[ERROR:].ctypes.data, words[TAKEN:].ctypes.data
        record["x_row_bytes"], record["act_row_bytes"], record["act_cols"] = self.sizes.rows()


def stage_maker(path: KernelPath) -> Any:
    """What makes the stage of a path."""
    if not path.kind.is_packed:
        return dense_stage.make_dense_stage
    is_rounding = path.kind.is_lossless and path.activations == "bf16"
    return lossless_stage.make_lossless_stage if is_rounding else packed_stage.make_packed_stage


def _check_places(place_of: I32, num_experts: int) -> None:
    """ValueError if a place is out of range: now rather than at the first step that finds it."""
    check_array("place_of", place_of, (place_of.size,), ID)
    if place_of.size and not -1 <= place_of.min() <= place_of.max() < num_experts:
        raise ValueError(f"place_of must be -1 to {num_experts - 1}")

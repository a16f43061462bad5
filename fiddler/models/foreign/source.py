"""A checkpoint whose matrices another program has quantised.

Experts are turned into packed bytes a few rows at a time; other matrices become numbers, as do
experts where numbers are asked for. What a matrix is stored as the file says, not the config's list
of exceptions: where the layout's tensors are missing, it is plain.

Ordering: as :mod:`fiddler.models.checkpoint`; any number of threads may read.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cpu_kernels.bf16 import F32, bf16_to_f32
from cpu_kernels.packed_layout import Quantised
from cpu_kernels.weight_kind import WeightKind
from fiddler.errors import NumericsError
from fiddler.models.checkpoint import Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.foreign.layout import Layout, Matrix, StoredPart
from fiddler.models.manifest import Part, dense_parts, expert_parts
from fiddler.models.packing import CHUNK, FillPacked, packing
from fiddler.models.weights import CheckpointSource

BITS = {"I32": np.uint32, "U8": np.uint8, "F8_E4M3": np.uint8, "BF16": np.uint16}
NUMBERS = {"F16": np.float16, "F32": np.float32}
ROLES = ("gate", "up", "down")


class ForeignSource:
    """Weights of an open checkpoint, whose quantised matrices have ``layout``."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, layout: Layout) -> None:
        self._reader = _CheckpointReader(checkpoint)
        self._checkpoint = checkpoint
        self._plain = CheckpointSource(checkpoint)
        self._config = config
        self._layout = layout
        self._experts = {
            part.name: self._expert(part, role, expert)
            for layer in range(config.num_layers)
            if config.is_moe_layer(layer)
            for expert in range(config.num_experts)
            for role, part in zip(ROLES, expert_parts(config, layer, expert), strict=True)
        }

    def check(self) -> None:
        """Verify that every tensor is here, with a shape and type that the layout has."""
        for part in dense_parts(self._config):
            matrix = self._matrix(part.name, part.shape)
            if matrix is None:
                self._checkpoint.tensor(part.name, part.shape)
            else:
                self._check(matrix)
        for matrix in self._experts.values():
            self._check(matrix)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a view of the mapped file, or new numbers in float32."""
        if self._matrix(name, shape) is None:
            return self._plain.tensor(name, shape)
        out = torch.empty(shape)
        self.fill_(out, name)
        return out

    def forget(self, name: str) -> None:
        """Leave no mapped page behind."""
        matrix = self._experts.get(name)
        if matrix is None:
            self._plain.forget(name)
        else:
            self._forget(matrix)

    def fill_(self, out: Tensor, name: str) -> None:
        """Write numbers into ``out``, a few rows at a time; NaN or Inf is a NumericsError."""
        matrix = self._matrix(name, tuple(out.shape))
        if matrix is None:
            self._plain.fill_(out, name)
            return
        step = max(1, CHUNK // matrix.cols // 16) * 16
        for first in range(0, matrix.rows, step):
            rows = slice(first, min(first + step, matrix.rows))
            w_NK = self._layout.numbers(self._reader, matrix, rows)
            _check_finite(w_NK, name)
            out[rows].copy_(torch.from_numpy(w_NK))
        self._forget(matrix)

    def packing(self, kind: WeightKind) -> FillPacked:
        """Experts in the layout's own kind."""
        return packing(self._config, kind, lambda part, rows: self._rows(part, rows, kind))

    def _rows(self, part: Part, rows: slice, kind: WeightKind) -> Quantised:
        matrix = self._experts[part.name]
        found = self._layout.codes(self._reader, matrix, rows, kind)
        _check_finite(found.scales_NG, part.name)
        if rows.stop == matrix.rows:
            self._forget(matrix)
        return found

    def _expert(self, part: Part, role: str, expert: int) -> Matrix:
        stem, num_experts = part.name.removesuffix(".weight"), self._config.num_experts
        rows, cols = part.shape
        return Matrix(stem, rows, cols, role, expert, num_experts)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Matrix | None:
        """What ``name`` is stored as; None if it is plain."""
        if name in self._experts:
            return self._experts[name]
        stem = name.removesuffix(".weight")
        marker, dtype = self._layout.marker(stem)
        if stem == name or self._checkpoint.dtype(marker) != dtype:
            return None
        rows, cols = shape
        return Matrix(stem, rows, cols)

    def _check(self, matrix: Matrix) -> None:
        for part in self._layout.parts(matrix):
            if part.is_needed or self._reader.has(part):
                self._checkpoint.raw(*part[:3])

    def _forget(self, matrix: Matrix) -> None:
        """All of a layer's experts may share tensors: the last one lets go of them."""
        parts = self._layout.parts(matrix)
        is_shared = not parts[0].name.startswith(matrix.stem)
        if is_shared and matrix.expert < matrix.num_experts - 1:
            return
        for part in parts:
            if self._reader.has(part):
                self._checkpoint.forget(part.name)


class _CheckpointReader:
    """Mapped tensors in numpy's words."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def has(self, part: StoredPart) -> bool:
        return part.name in self._checkpoint

    def bits(self, part: StoredPart) -> npt.NDArray[np.unsignedinteger]:
        dtype, data = self._checkpoint.raw(part.name, part.shape, part.dtypes)
        return np.frombuffer(data, BITS[dtype]).reshape(part.shape)

    def floats(self, part: StoredPart) -> F32:
        dtype, data = self._checkpoint.raw(part.name, part.shape, part.dtypes)
        if dtype == "BF16":
            return bf16_to_f32(np.frombuffer(data, np.uint16)).reshape(part.shape)
        return np.frombuffer(data, NUMBERS[dtype]).astype(np.float32).reshape(part.shape)


def _check_finite(numbers: F32, name: str) -> None:
    if not np.isfinite(numbers.max() - numbers.min()):
        raise NumericsError(f"tensor {name} holds NaN or Inf")

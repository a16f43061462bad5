"""What a layout of quantised matrices has to tell and to do.

Shapes: N rows, K columns, G groups of a row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import F32
from cpu_kernels.packed_layout import U8, Quantised, decode_scales, encode_scales
from cpu_kernels.weight_kind import Scales, WeightKind

U32 = npt.NDArray[np.uint32]
FLOATS = ("F16", "BF16", "F32")  # as safetensors spells them


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight ``[rows, cols]`` of a model, of which ``stem`` names the parts.

    Of an expert's, ``role`` is gate, up or down.
    """

    stem: str
    rows: int
    cols: int
    role: str = ""
    expert: int = 0
    num_experts: int = 0


class StoredPart(NamedTuple):
    """One tensor of the file, and the types that it may have."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_needed: bool = True


class Reader(Protocol):
    """The file: mapped tensors, not to be written to."""

    def bits(self, part: StoredPart) -> npt.NDArray[Any]:
        """As unsigned numbers of the stored width."""

    def floats(self, part: StoredPart) -> F32:
        """As float32."""

    def has(self, part: StoredPart) -> bool:
        """Whether it is there, which matters of those that are not needed."""


class Layout(Protocol):
    """How some program stores a matrix as codes and scales."""

    @property
    def name(self) -> str:
        """For people."""

    def kind(self, stored: str) -> WeightKind:
        """What its experts become; ``stored`` is torch's name of the scales' type."""

    def marker(self, stem: str) -> tuple[str, str]:
        """Name and type of the tensor by which a matrix is known to be stored so."""

    def parts(self, matrix: Matrix) -> tuple[StoredPart, ...]:
        """All tensors of a matrix."""

    def codes(self, reader: Reader, matrix: Matrix, rows: slice, kind: WeightKind) -> Quantised:
        """Some rows in codes of ``kind``; a multiple of 16 rows, or up to the last.

        CheckpointError for what the layout allows and fiddler does not read.
        """

    def numbers(self, reader: Reader, matrix: Matrix, rows: slice) -> F32:
        """The same rows as numbers."""


def scales_of(stored: str) -> Scales:
    """The kernels' type for scales stored so: the same, or float16 for float32."""
    return "bf16" if stored == "bfloat16" else "f16"


def as_stored(values_NG: F32, scales: Scales) -> F32:
    """Scales rounded to the kernels' type; it has exactly what was stored in that type."""
    return decode_scales(encode_scales(values_NG, scales), scales)


def spread(values_NG: npt.NDArray[Any], group: int, cols: int, wanted: int) -> npt.NDArray[Any]:
    """Values of groups of ``group`` columns (0: all) for groups of ``wanted``, which divides it."""
    first_G = np.arange(-(-cols // wanted)) * wanted
    return np.ascontiguousarray(values_NG[:, first_G // group if group else first_G * 0])


def nibbles(words: U32, order: tuple[int, ...]) -> U8:
    """Words ``[..., W]`` as codes ``[..., 8 W]``; nibble i, from the lowest, is ``order[i]``."""
    found = np.empty((*words.shape, 8), np.uint8)
    for nibble, place in enumerate(order):
        found[..., place] = words >> np.uint32(4 * nibble) & np.uint32(15)
    return found.reshape(*words.shape[:-1], -1)


def unpacked(words: U32, bits: int) -> U8:
    """Contiguous words as codes of 4 or 8 bits, the lowest bits of a word first."""
    found = words.view(np.uint8)
    if bits == 8:
        return found
    return np.stack([found & 15, found >> 4], axis=-1).reshape(*words.shape[:-1], -1)

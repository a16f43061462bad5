"""A layer's resident experts as the expert kernels take them: dense or packed, in slots.

Packed experts are blocks of 16 rows (docs/packed-experts.md); offsets and sizes follow from a few
integers. Shapes: S slots, H hidden, I expert width, F = 2I (gate rows, then up rows).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "clamped_swiglu"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATION_KINDS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
BLOCK_ROWS = 16
ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Activation:
    """act = f(gate, up); ``limit`` and ``alpha`` are clamped_swiglu's, preset to gpt-oss's."""

    kind: ActivationKind = "silu"
    limit: float = 7.0
    alpha: float = 1.702

    def __post_init__(self) -> None:
        assert self.kind in ACTIVATION_KINDS, self.kind


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where codes, scales and zero points of a packed expert lie; everything in bytes.

    12 ``bits`` are bf12: a scale a row, and exceptions, of which a block has so many at most.
    """

    bits: int
    group: int
    has_zeros: bool
    scale_dtype: torch.dtype
    hidden: int
    width: int

    def __post_init__(self) -> None:
        assert self.bits in (4, 8, 12) and self.group in (32, 64, 128), self
        assert self.scale_dtype in (torch.float16, torch.bfloat16), self
        assert self.hidden > 0 and self.width > 0, self

    @property
    def w2_offset(self) -> int:
        return 2 * -(-self.width // BLOCK_ROWS) * self.block_bytes(self.hidden)

    @property
    def expert_bytes(self) -> int:
        return self.w2_offset + -(-self.hidden // BLOCK_ROWS) * self.block_bytes(self.width)

    def scale_offset(self, cols: int) -> int:
        """Bytes of codes before the scales in a block of a matrix with ``cols`` columns."""
        return BLOCK_ROWS * self._groups(cols) * self.group * self.bits // 8

    def zero_offset(self, cols: int) -> int:
        per_row = 1 if self.bits == 12 else self._groups(cols)
        return self.scale_offset(cols) + 2 * BLOCK_ROWS * per_row

    def most_exceptions(self, cols: int) -> int:
        return -(-self._groups(cols) * self.group // 256) * 16

    def block_bytes(self, cols: int) -> int:
        if self.bits == 12:
            return self.scale_offset(cols) + ALIGNMENT + 4 * self.most_exceptions(cols)
        used = self.zero_offset(cols) + BLOCK_ROWS * self._groups(cols) * self.has_zeros
        return -(-used // ALIGNMENT) * ALIGNMENT

    def _groups(self, cols: int) -> int:
        return -(-cols // self.group)


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """Row-major ``w13_SFH`` (gate rows, then up rows) and ``w2_SHI`` in x's dtype.

    Half-precision weights also serve a float32 x, for which they are widened. Slots may be strided;
    the rows of one slot are contiguous.
    """

    w13_SFH: Tensor
    w2_SHI: Tensor

    def __post_init__(self) -> None:
        slots, hidden, width = self.w2_SHI.shape
        assert self.w13_SFH.shape == (slots, 2 * width, hidden) and slots > 0
        assert self.w13_SFH.dtype == self.w2_SHI.dtype and self.w2_SHI.dtype in FLOAT_DTYPES
        assert self.w13_SFH.device == self.w2_SHI.device
        assert self.w13_SFH[0].is_contiguous() and self.w2_SHI[0].is_contiguous()
        assert max(self.w13_SFH[0].numel(), self.w2_SHI[0].numel()) < 2**31

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Slots, hidden, width."""
        slots, hidden, width = self.w2_SHI.shape
        return slots, hidden, width


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """Packed experts, uint8 ``[S, at least expert_bytes]``, slots aligned to 16 bytes."""

    blob_SB: Tensor
    layout: PackedLayout

    def __post_init__(self) -> None:
        assert self.blob_SB.dtype == torch.uint8 and self.blob_SB.ndim == 2
        assert self.blob_SB.shape[0] > 0 and self.blob_SB.stride(1) == 1
        assert self.blob_SB.shape[1] >= self.layout.expert_bytes
        assert self.blob_SB.data_ptr() % 16 == 0 and self.blob_SB.stride(0) % 16 == 0
        assert self.layout.expert_bytes < 2**31

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Slots, hidden, width."""
        return self.blob_SB.shape[0], self.layout.hidden, self.layout.width


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The resident experts of one layer; biases are float32, one row per slot.

    ``reader``: the device that reads weights in mapped host memory, where everything else lies;
    None: the weights lie on the device themselves. ``prepared`` belongs to
    ``grouped_gemm``: what it has worked out for this layer, by tiles. It goes when the layer goes.
    """

    weights: DenseWeights | PackedWeights
    activation: Activation = Activation()
    b13_SF: Tensor | None = None
    b2_SH: Tensor | None = None
    reader: torch.device | None = None
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        slots, hidden, width = self.weights.sizes
        for bias, cols in ((self.b13_SF, 2 * width), (self.b2_SH, hidden)):
            if bias is not None:
                assert bias.shape == (slots, cols) and bias.dtype == torch.float32
                assert bias.is_contiguous() and bias.device == self.device

    @property
    def device(self) -> torch.device:
        """Where kernels run that read the weights."""
        weights = self.weights
        if self.reader is not None:
            return self.reader
        return (weights.w2_SHI if isinstance(weights, DenseWeights) else weights.blob_SB).device

    @property
    def num_slots(self) -> int:
        return self.weights.sizes[0]

    @property
    def hidden(self) -> int:
        return self.weights.sizes[1]

    @property
    def width(self) -> int:
        return self.weights.sizes[2]


def matrix_views(weights: DenseWeights | PackedWeights) -> tuple[Tensor, Tensor]:
    """w13 and w2 of all slots as kernels take them: an address and a stride per slot."""
    if isinstance(weights, DenseWeights):
        return weights.w13_SFH, weights.w2_SHI
    return weights.blob_SB, weights.blob_SB[:, weights.layout.w2_offset :]


def check_routing(
    layer: ExpertLayer, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, slot_E: Tensor
) -> None:
    """Assert what every launcher needs of a step's inputs.

    ``ids_TK`` int32, -1 or an index into ``slot_E``, no expert twice in a token; ``weights_TK``
    float32; ``slot_E`` int32, an expert's slot or -1. What they hold is not checked.
    """
    num_tokens, hidden = x_TH.shape
    assert hidden == layer.hidden and x_TH.dtype in FLOAT_DTYPES
    assert x_TH.stride(1) == 1, x_TH.stride()
    if isinstance(layer.weights, DenseWeights):
        dtype = layer.weights.w2_SHI.dtype
        assert x_TH.dtype in (dtype, torch.float32), "x must be float32 or as the weights"
    assert ids_TK.ndim == 2 and ids_TK.shape[0] == num_tokens and ids_TK.shape[1] > 0
    assert ids_TK.dtype == torch.int32 and ids_TK.is_contiguous()
    assert weights_TK.shape == ids_TK.shape and weights_TK.dtype == torch.float32
    assert weights_TK.is_contiguous()
    assert slot_E.ndim == 1 and slot_E.dtype == torch.int32 and slot_E.is_contiguous()
    assert {t.device for t in (x_TH, ids_TK, weights_TK, slot_E)} == {layer.device}

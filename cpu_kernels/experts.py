"""One layer's expert weights in host memory, as the CPU kernels take them.

E experts held, I expert width, H hidden, F = 2I.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.activation_reference import CLAMP_ALPHA, CLAMP_LIMIT, Activation
from cpu_kernels.bf16 import F32, U16
from cpu_kernels.checks import FLOAT, check_array
from cpu_kernels.packed_layout import U8, PackedShape
from cpu_kernels.weight_kind import WeightKind

DENSE: dict[np.dtype[Any], WeightKind] = {
    np.dtype(np.uint16): WeightKind("bf16"),
    np.dtype(np.float32): WeightKind("f32"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """What an expert computes: down(f(gate(x), up(x))), with biases where it has them.

    ``limit`` and ``alpha`` belong to ``clamped_swiglu``. ``b13_EF`` holds the gate's I, then up's.
    """

    activation: Activation = "silu"
    limit: float = CLAMP_LIMIT
    alpha: float = CLAMP_ALPHA
    b13_EF: F32 | None = None
    b2_EH: F32 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Weights of one layer; made by :func:`dense_experts` or :func:`packed_experts`.

    ``w13`` and ``w2`` are addresses of the first expert's, ``*_stride`` the bytes to the next one.
    """

    kind: WeightKind
    num_experts: int
    hidden: int
    width: int
    w13: int
    w13_stride: int
    w2: int
    w2_stride: int
    mlp: Mlp = field(default_factory=Mlp)
    arrays: tuple[npt.NDArray[Any], ...]  # alive while the addresses are


def dense_experts(w13_EFH: U16 | F32, w2_EHI: U16 | F32, mlp: Mlp | None = None) -> Experts:
    """Row-major weights: uint16 (bf16 bits) or float32, C-contiguous; nothing is copied.

    ``w13_EFH`` holds I gate rows, then I up rows. ValueError if something does not fit.
    """
    if w2_EHI.ndim != 3:
        raise ValueError(f"w2 must be [E, H, I], not {w2_EHI.shape}")
    num_experts, hidden, width = w2_EHI.shape
    check_array("w2", w2_EHI, w2_EHI.shape, tuple(DENSE))
    check_array("w13", w13_EFH, (num_experts, 2 * width, hidden), (w2_EHI.dtype,))
    size = w2_EHI.dtype.itemsize
    return Experts(
        kind=DENSE[w2_EHI.dtype],
        num_experts=num_experts,
        hidden=hidden,
        width=width,
        w13=w13_EFH.ctypes.data,
        w13_stride=2 * width * hidden * size,
        w2=w2_EHI.ctypes.data,
        w2_stride=hidden * width * size,
        mlp=_checked(mlp, num_experts, hidden, width),
        arrays=(w13_EFH, w2_EHI),
    )


def packed_experts(blob_EB: U8, shape: PackedShape, mlp: Mlp | None = None) -> Experts:
    """Packed weights, uint8 [E, shape.expert_bytes]; nothing is copied. ValueError as above.

    The rows may lie further apart than they are long, as in a larger array.
    """
    if blob_EB.dtype != np.uint8 or blob_EB.ndim != 2 or blob_EB.shape[1] != shape.expert_bytes:
        raise ValueError(f"packed experts must be uint8 [E, {shape.expert_bytes}]")
    if blob_EB.size and blob_EB.strides[1] != 1:
        raise ValueError("the bytes of a packed expert must be contiguous")
    stride = blob_EB.strides[0]
    return Experts(
        kind=shape.kind,
        num_experts=len(blob_EB),
        hidden=shape.hidden,
        width=shape.width,
        w13=blob_EB.ctypes.data,
        w13_stride=stride,
        w2=blob_EB.ctypes.data + shape.w2_offset,
        w2_stride=stride,
        mlp=_checked(mlp, len(blob_EB), shape.hidden, shape.width),
        arrays=(blob_EB,),
    )


def _checked(mlp: Mlp | None, num_experts: int, hidden: int, width: int) -> Mlp:
    mlp = Mlp() if mlp is None else mlp
    sizes = (("b13", mlp.b13_EF, 2 * width), ("b2", mlp.b2_EH, hidden))
    for name, bias, size in sizes:
        if bias is not None:
            check_array(name, bias, (num_experts, size), FLOAT)
    return mlp

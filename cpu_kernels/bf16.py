"""bf16 bit patterns in numpy, which has no such type, and short names for arrays."""

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U16 = npt.NDArray[np.uint16]
Integers = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def bf16_to_f32(bits: U16) -> F32:
    """The exact float32 values of bf16 bit patterns; same shape."""
    assert bits.dtype == np.uint16, bits.dtype
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def f32_to_bf16(values: npt.ArrayLike) -> U16:
    """bf16 bit patterns, rounded to nearest even; NaN stays NaN, too large becomes Inf."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    quiet = (bits >> 16) | np.uint32(0x0040)  # rounding could carry a NaN's mantissa to Inf
    bf16: U16 = np.where(is_nan, quiet, rounded).astype(np.uint16)
    return bf16.reshape(np.shape(values))


def widen(weights: U16 | F32) -> F64:
    """Weights of either kind as float64."""
    floats = bf16_to_f32(weights) if weights.dtype == np.uint16 else weights  # type: ignore[arg-type]
    return floats.astype(np.float64)

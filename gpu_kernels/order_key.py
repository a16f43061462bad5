"""Floats with their indices as integers that sort like them: one maximum finds both.

A packed int64 has the float in its high half and the complement of the index in its low one, so
equal floats are won by the lower index, and no two entries are equal. NaN is above everything.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(2**63))  # below every packed float
HIGHEST = tl.constexpr(2**63 - 1)  # above every packed float
_INDEX_MASK = tl.constexpr(0x7FFFFFFF)


@triton.jit
def order_key(value):
    """Return int32s that compare like the float32s ``value``; -0 counts as 0."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & _INDEX_MASK)  # negative floats: the larger the bits, the smaller
    return tl.where(value == value, key, _INDEX_MASK)


@triton.jit
def key_value(key):
    """The inverse of ``order_key``."""
    return (key ^ ((key >> 31) & _INDEX_MASK)).to(tl.float32, bitcast=True)


@triton.jit
def pack(value, index):
    """Join float32s and their indices, 0..2**31 - 1."""
    return (order_key(value).to(tl.int64) << 32) | (index ^ _INDEX_MASK).to(tl.int64)


@triton.jit
def packed_index(packed):
    return (packed & _INDEX_MASK).to(tl.int32) ^ _INDEX_MASK


@triton.jit
def packed_value(packed):
    return key_value((packed >> 32).to(tl.int32))

"""Hidden states as products read them: float32, bf16 in float32, or bf16."""

import numpy as np

from cpu_kernels.addresses import bits_of, f32_array, float_of, u16_array
from cpu_kernels.intrinsics import jit

AS_F32, AS_ROUNDED_F32, AS_BF16 = range(3)  # how the products read hidden states


@jit
def bf16_bits(x):
    """bf16 of a float32, to nearest even, in the upper half of an int32; NaN stays NaN."""
    bits = bits_of(x)
    if bits & 0x7FFFFFFF > 0x7F800000:
        return np.int32(bits | 0x400000)
    return np.int32((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF)


@jit
def bf16_pair(first, second):
    """Two bf16 numbers in the upper halves of int32, whatever is below, in one."""
    return (second & -65536) | ((first >> 16) & 0xFFFF)


@jit
def store_row(form, x, address):
    """Write the float32 array ``x`` to ``address`` in one of the forms above."""
    if form == AS_BF16:
        halves = u16_array(address, len(x))
        for k in range(len(x)):
            halves[k] = np.uint16((bf16_bits(x[k]) >> 16) & 0xFFFF)
    else:
        floats = f32_array(address, len(x))
        for k in range(len(x)):
            floats[k] = float_of(bf16_bits(x[k])) if form == AS_ROUNDED_F32 else x[k]


@jit
def round_x(form, job, worker, num_workers):
    """One worker's part of x as the products read it; the parts are runs of elements."""
    size = 2 if form == AS_BF16 else 4
    total = job.num_tokens * job.hidden
    begin, end = total * worker // num_workers, total * (worker + 1) // num_workers
    store_row(form, f32_array(job.x + 4 * begin, end - begin), job.x_rows + size * begin)

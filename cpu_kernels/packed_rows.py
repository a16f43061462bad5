"""Hidden states as the packed kernels read them: one row of bytes per token.

float32: [K'] times a power of two, rounded to bf16 or not, with zeros after K. int8: codes int8
[K'], then scales float32 [G], then the sums of the codes as float32 [G]; see
``quantise_activations`` in :mod:`cpu_kernels.packed_reference`.
"""

import numpy as np

from cpu_kernels.addresses import bits_of, f32_array, float_of, i8_array
from cpu_kernels.intrinsics import jit
from cpu_kernels.rounding import AS_ROUNDED_F32, bf16_bits

AS_CODES = 3  # beside the forms of cpu_kernels.rounding
LARGEST_CODE = np.float32(127)
PART = np.float32(1) / LARGEST_CODE
SMALLEST_BITS = 9 << 23  # of 2**-118: below, a group counts as zero
INF_BITS = 0x7F800000
MAGNITUDE = np.int32(0x7FFFFFFF)
ROUNDER = np.float32(1.5 * 2**23)  # added and taken away it rounds half to even


@jit
def copy_group(form, x, row, g, group, factor):
    """The float32 of group ``g`` times ``factor``; it may be shorter than the others in ``x``."""
    out = f32_array(row + 4 * g * group, group)
    for k in range(len(x)):
        number = x[k] * factor
        out[k] = float_of(bf16_bits(number)) if form == AS_ROUNDED_F32 else number
    for k in range(len(x), group):
        out[k] = np.float32(0)


@jit
def quantise_group(x, row, g, group, num_groups):
    """Codes, scale and sum of group ``g``."""
    codes = i8_array(row + g * group, group)
    floats = f32_array(row + num_groups * group, 2 * num_groups)
    most = np.int32(0)
    for k in range(len(x)):  # the order of floats' magnitudes is that of their bits; NaN is largest
        most = max(most, bits_of(x[k]) & MAGNITUDE)
    total = np.int32(0)
    if SMALLEST_BITS <= most < INF_BITS:
        largest = float_of(np.int32(most))
        inverse, scale = LARGEST_CODE / largest, largest * PART
        for k in range(len(x)):
            code = np.int32(x[k] * inverse + ROUNDER - ROUNDER)
            codes[k] = code
            total += code
        for k in range(len(x), group):
            codes[k] = 0
    else:
        scale = np.float32(0) if most < INF_BITS else np.float32(np.nan)
        for k in range(group):
            codes[k] = 0
    floats[g], floats[num_groups + g] = scale, np.float32(total)


@jit
def prepare_rows(
    source, stride, cols, num_rows, rows, row_bytes, form, group, factor, worker, num_workers
):
    """One worker's groups of all rows: float32 at ``source`` to prepared rows at ``rows``.

    From row to row there are ``stride`` floats, and ``row_bytes`` bytes of what is prepared. A
    power of two, ``factor`` is for those that stay float32.
    """
    num_groups = (cols + group - 1) // group
    total = num_rows * num_groups
    for unit in range(total * worker // num_workers, total * (worker + 1) // num_workers):
        r, g = unit // num_groups, unit % num_groups
        length = min(group, cols - g * group)
        x = f32_array(source + 4 * (r * stride + g * group), length)
        if form == AS_CODES:
            quantise_group(x, rows + r * row_bytes, g, group, num_groups)
        else:
            copy_group(form, x, rows + r * row_bytes, g, group, factor)

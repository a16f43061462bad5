"""Gumbel noise by seed, position and token id: adding it to logits and taking the best is a draw.

Philox with the seed as key and (id / 4, position) as counter gives the bits of four neighbouring
ids. Noise is -log(E) with E exponential. E comes from a uniform number that is fine near 0, where
large noise is made: -log(-log(u)) of a float32 u would be infinite for one token in 2**25.

Shapes: N ids, M = N / 4 counters.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_UNIFORM = tl.constexpr(1 - 2**-24)  # the float32 before 1
STEP = tl.constexpr(2.0**-32)


@triton.jit
def gumbel_noise(seed, position, counter_M):
    """Return noise of ids ``4 * counter_M + (0, 1, 2, 3)``, in this order: ``4 * M`` float32s."""
    zero_M = counter_M * 0
    low_M = zero_M + (position & 0xFFFFFFFF).to(tl.int32)
    high_M = zero_M + (position >> 32).to(tl.int32)
    a_M, b_M, c_M, d_M = tl.philox(seed, counter_M, low_M, high_M, zero_M)
    bits_N = tl.interleave(tl.interleave(a_M, c_M), tl.interleave(b_M, d_M))
    u_N = tl.minimum(bits_N.to(tl.float32) * STEP + STEP / 2, LARGEST_UNIFORM)
    # -log(1 - u); four terms of its series are exact to float32 where 1 - u would round u away
    series_N = u_N * (1.0 + u_N * (0.5 + u_N * (1.0 / 3.0 + u_N * 0.25)))
    exponential_N = tl.where(u_N < 1.0 / 64.0, series_N, -tl.log(1.0 - u_N))
    return -tl.log(exponential_N)

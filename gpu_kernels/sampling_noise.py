"""Gumbel noise by seed, position and token id: adding it to logits and taking the best is a draw.

Philox with the seed as key and (id / 4, position) as counter gives the bits of four neighbouring
ids. Noise is -log(E) with E exponential. E comes from a uniform number that is fine near 0, where
large noise is made: -log(-log(u)) of a float32 u would be infinite for one token in 2**25.

Shapes: N ids, M = N / 4 counters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
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


def gumbel_noise_reference(seed: int, position: int, num_ids: int) -> Tensor:
    """The same for ids 0..num_ids - 1 in plain torch, by log1p."""
    counter_M = torch.arange(-(-num_ids // 4))
    zero_M = torch.zeros_like(counter_M)
    words = [counter_M, zero_M + (position & _WORD), zero_M + (position >> 32 & _WORD), zero_M]
    keys = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = (
            _product(words[0], _ROUND_A),
            _product(words[2], _ROUND_B),
        )
        words = [high_2 ^ words[1] ^ keys[0], low_2, high_0 ^ words[3] ^ keys[1], low_0]
        keys = [(keys[0] + _KEY_A) & _WORD, (keys[1] + _KEY_B) & _WORD]
    bits_N = torch.stack(words, dim=1).flatten()[:num_ids]
    u_N = (bits_N.float() * 2**-32 + 2**-33).clamp(max=1 - 2**-24)
    return -torch.log(-torch.log1p(-u_N))


def _product(word_M: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two 32-bit numbers; int64 would overflow at once."""
    high_M = (word_M * (factor >> 16) + (word_M * (factor & 0xFFFF) >> 16)) >> 16
    return high_M, (word_M * factor) & _WORD

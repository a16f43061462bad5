"""The draw among the tokens that top_k, top_p and min_p keep, without sorting the vocabulary.

Tokens are ranked by logit, equal ones by id; each filter keeps a first part of that ranking, so
"is token c kept" needs only the number and the mass of the tokens above c. The best token by logit
plus noise is asked first. If it is dropped, so is all below it, and the best above it is asked
next. The first kept one is the draw: exact, and mostly at the first question, since it fails with
the probability of what the filters drop. Only groups of the vocabulary whose maximum is high enough
are read.

Shapes: N listed tokens at a time, G groups of the vocabulary, T tiles.
"""

import triton
import triton.language as tl

from gpu_kernels.order_key import LOWEST, key_value, order_key, pack, packed_index
from gpu_kernels.sampling_noise import gumbel_noise

NEG_INF = tl.constexpr(float("-inf"))
MIN_P_SLACK = tl.constexpr(1e-3)  # more than a logarithm's rounding; min_p itself is tested exactly


@triton.jit
def _list_groups(listed_ptr, group_max_G, num_groups, start):
    """Write down the groups with a token of at least ``start``; return their number."""
    g_G = tl.arange(0, group_max_G.shape[0])
    is_listed_G = (group_max_G >= start) & (g_G < num_groups)
    place_G = tl.cumsum(is_listed_G.to(tl.int32), 0) - 1
    tl.debug_barrier()  # nothing reads the list of an earlier call any more
    tl.store(listed_ptr + place_G, g_G, mask=is_listed_G)
    tl.debug_barrier()
    return tl.sum(is_listed_G.to(tl.int32), 0)


@triton.jit
def _listed_ids(listed_ptr, place_N, num_listed, WIDTH: tl.constexpr):
    """Return entry ``place_N`` of the listed groups laid side by side, -1 beyond the last."""
    group_N = tl.load(listed_ptr + place_N // WIDTH, mask=place_N < num_listed * WIDTH, other=-1)
    return tl.where(group_N < 0, -1, group_N * WIDTH + place_N % WIDTH)


@triton.jit
def _count_at_least(
    scaled_ptr, listed_ptr, num_listed, value, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    count_N = tl.zeros([BLOCK], tl.int32)
    for first in range(0, num_listed * GROUP, BLOCK):
        id_N = _listed_ids(listed_ptr, first + tl.arange(0, BLOCK), num_listed, GROUP)
        z_N = tl.load(scaled_ptr + id_N, mask=id_N >= 0, other=NEG_INF)
        count_N += ((z_N >= value) & (id_N >= 0)).to(tl.int32)
    return tl.sum(count_N, 0)


@triton.jit
def _middle(low, high):
    """The upper middle of two int32s whose difference may need 33 bits."""
    return (low + (high.to(tl.int64) - low + 1) // 2).to(tl.int32)


@triton.jit
def _kth_maximum(group_max_G, k, num_groups):
    """Return the k-th largest group maximum, by bisection over the bits of floats."""
    is_group_G = tl.arange(0, group_max_G.shape[0]) < num_groups
    low = order_key(tl.min(tl.where(is_group_G, group_max_G, float("inf")), 0))
    high = order_key(tl.max(group_max_G, 0))
    while low < high:
        middle = _middle(low, high)
        enough = tl.sum((group_max_G >= key_value(middle)).to(tl.int32), 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return key_value(low)


@triton.jit
def _kth_listed(
    scaled_ptr,
    listed_ptr,
    num_listed,
    k,
    at_least,
    at_most,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the k-th largest listed logit, which lies in ``at_least..at_most``."""
    low, high = order_key(at_least), order_key(at_most)
    while low < high:
        middle = _middle(low, high)
        value = key_value(middle)
        enough = _count_at_least(scaled_ptr, listed_ptr, num_listed, value, GROUP, BLOCK) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return key_value(low)


@triton.jit
def _is_above(z_N, id_N, z, token):
    return (id_N >= 0) & ((z_N > z) | ((z_N == z) & (id_N < token)))


@triton.jit
def _weigh_above(
    scaled_ptr,
    listed_ptr,
    num_listed,
    z,
    token,
    row_max,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return number and mass of the tokens that rank above ``token`` with its logit ``z``."""
    count_N = tl.zeros([BLOCK], tl.int32)
    mass_N = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_listed * GROUP, BLOCK):
        id_N = _listed_ids(listed_ptr, first + tl.arange(0, BLOCK), num_listed, GROUP)
        z_N = tl.load(scaled_ptr + id_N, mask=id_N >= 0, other=NEG_INF)
        is_above_N = _is_above(z_N, id_N, z, token)
        count_N += is_above_N.to(tl.int32)
        mass_N += tl.where(is_above_N, tl.exp(z_N - row_max), 0.0)
    return tl.sum(count_N, 0), tl.sum(mass_N, 0)


@triton.jit
def _best_above(
    scaled_ptr,
    listed_ptr,
    num_listed,
    z,
    token,
    low,
    seed,
    position,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the best token by logit plus noise of those that rank above ``token``."""
    best = tl.full([], LOWEST, tl.int64)
    for first in range(0, num_listed * GROUP, BLOCK):
        id_N = _listed_ids(listed_ptr, first + tl.arange(0, BLOCK), num_listed, GROUP)
        place_M = first // 4 + tl.arange(0, BLOCK // 4)
        counter_M = _listed_ids(listed_ptr, place_M, num_listed, GROUP // 4)
        z_N = tl.load(scaled_ptr + id_N, mask=id_N >= 0, other=NEG_INF)
        packed_N = pack(z_N + gumbel_noise(seed, position, counter_M), id_N)
        can_be_N = _is_above(z_N, id_N, z, token) & (z_N >= low)
        best = tl.maximum(best, tl.max(tl.where(can_be_N, packed_N, LOWEST), 0))
    return packed_index(best)


@triton.jit
def draw_filtered(
    token,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    scaled_ptr,
    tile_max_T,
    tile_sum_T,
    group_max_G,
    listed_ptr,
    vocab,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the draw of one row; ``token`` is the best of all tokens, kept or not."""
    num_groups = tl.cdiv(vocab, GROUP)
    row_max = tl.max(tile_max_T, 0)
    mass = tl.sum(tile_sum_T * tl.exp(tile_max_T - row_max), 0)
    z = tl.load(scaled_ptr + token)
    k = tl.where((top_k > 0) & (top_k < vocab), top_k, vocab)
    low = tl.full([], NEG_INF, tl.float32)  # below it nothing is kept
    if k <= num_groups:  # k groups have a maximum of at least this, so k tokens do
        low = _kth_maximum(group_max_G, k, num_groups)
    if (k < vocab) & (top_p < 1.0):  # top_p is a part of the mass of the k best
        num_listed = _list_groups(listed_ptr, group_max_G, num_groups, low)
        kth = _kth_listed(scaled_ptr, listed_ptr, num_listed, k, low, row_max, GROUP, BLOCK)
        above, mass = _weigh_above(
            scaled_ptr, listed_ptr, num_listed, kth, -1, row_max, GROUP, BLOCK
        )
        mass += (k - above) * tl.exp(kth - row_max)
        low = kth
    if min_p > 0.0:
        low = tl.maximum(low, row_max + tl.log(min_p) - MIN_P_SLACK)

    num_listed = _list_groups(listed_ptr, group_max_G, num_groups, tl.maximum(low, z))
    largest_mass = tl.where(top_p < 1.0, top_p * mass, float("inf"))
    searching = 1
    while searching != 0:
        above, mass_above = _weigh_above(
            scaled_ptr, listed_ptr, num_listed, z, token, row_max, GROUP, BLOCK
        )
        is_kept = (above < k) & (mass_above < largest_mass) & (tl.exp(z - row_max) >= min_p)
        if is_kept | (above == 0):
            searching = 0
        else:
            token = _best_above(
                scaled_ptr,
                listed_ptr,
                num_listed,
                z,
                token,
                low,
                seed,
                position,
                GROUP,
                BLOCK,
            )
            z = tl.load(scaled_ptr + token)
    return token

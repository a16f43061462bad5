"""The pass over the vocabulary: adjust each logit, add its noise, keep each tile's best token.

Bias, then penalties, then temperature, in float32. Rows that filter their tokens also leave their
scaled logits and the maxima and sums from which ``sampling_filter`` goes on.

Shapes: N tokens of a tile.
"""

import triton
import triton.language as tl

from gpu_kernels import sampling_inputs
from gpu_kernels.order_key import HIGHEST, pack
from gpu_kernels.sampling_noise import gumbel_noise
from gpu_kernels.token_counts import COUNT_MASK

GREEDY_BELOW = tl.constexpr(sampling_inputs.GREEDY_BELOW)


@triton.jit
def filters_tokens(top_k, top_p, min_p, vocab):
    """Whether these settings drop any token."""
    return ((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0)


@triton.jit
def add_bias(x_N, id_N, ids_ptr, values_ptr, MAX_BIAS: tl.constexpr):
    """Add a request's biases to a tile, in the order of its list."""
    first = tl.min(id_N, 0)
    entry = 0
    token = tl.load(ids_ptr)
    while token >= 0:
        if (token >= first) & (token < first + x_N.shape[0]):
            value = tl.load(values_ptr + entry)
            x_N = tl.where(id_N == token, x_N + value, x_N)
        entry += 1
        token = tl.load(ids_ptr + entry, mask=entry < MAX_BIAS, other=-1)
    return x_N


@triton.jit
def penalise(x_N, count_N, repetition, presence, frequency):
    """Repetition for what prompt or output have, then presence and frequency for outputs."""
    by_sign_N = tl.where(x_N > 0.0, tl.div_rn(x_N, repetition), x_N * repetition)
    x_N = tl.where(count_N != 0, by_sign_N, x_N)
    times_N = (count_N & COUNT_MASK).to(tl.float32)
    return tl.where(times_N > 0.0, x_N - (presence + frequency * times_N), x_N)


@triton.jit
def _store_scaled(
    z_N,
    scaled_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    group_max_ptr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    tl.store(scaled_ptr + tl.arange(0, TILE), z_N)
    group_max_G = tl.max(tl.reshape(z_N, [TILE // GROUP, GROUP]), 1)
    tl.store(group_max_ptr + tl.arange(0, TILE // GROUP), group_max_G)
    tile_max = tl.max(group_max_G, 0)
    base = tl.where(tile_max == float("-inf"), 0.0, tile_max)  # -inf - -inf is NaN
    tl.store(tile_max_ptr, tile_max)
    tl.store(tile_sum_ptr, tl.sum(tl.exp(z_N - base), 0))


@triton.jit
def draw_tile_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    slot_ptr,
    counts_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    scaled_ptr,
    winner_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    group_max_ptr,
    stride_logits,
    stride_slot,
    vocab,
    HAS_PENALTIES: tl.constexpr,
    MAX_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    partial = row * tl.num_programs(0) + tile
    temperature = tl.load(temperature_ptr + row)  # all at once: one wait for memory, not five
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    id_N = tile * TILE + tl.arange(0, TILE)
    mask_N = id_N < vocab
    x_ptr = logits_ptr + row * stride_logits
    x_N = tl.load(x_ptr + id_N, mask=mask_N, other=float("-inf")).to(tl.float32)
    is_bad_N = (x_N != x_N) | (x_N == float("inf"))
    x_N = tl.where(is_bad_N, float("-inf"), x_N)
    if MAX_BIAS > 0:
        bias_row = row * MAX_BIAS
        x_N = add_bias(x_N, id_N, bias_ids_ptr + bias_row, bias_values_ptr + bias_row, MAX_BIAS)
    if HAS_PENALTIES:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot >= 0:
            count_N = tl.load(counts_ptr + slot * stride_slot + id_N, mask=mask_N, other=0)
            repetition, presence = tl.load(repetition_ptr + row), tl.load(presence_ptr + row)
            x_N = penalise(x_N, count_N, repetition, presence, tl.load(frequency_ptr + row))
    if temperature >= GREEDY_BELOW:
        x_N = tl.div_rn(x_N, temperature)
        if filters_tokens(top_k, top_p, min_p, vocab):
            _store_scaled(
                x_N,
                scaled_ptr + partial * TILE,
                tile_max_ptr + partial,
                tile_sum_ptr + partial,
                group_max_ptr + partial * (TILE // GROUP),
                TILE,
                GROUP,
            )
        counter_M = tile * (TILE // 4) + tl.arange(0, TILE // 4)
        x_N += gumbel_noise(seed, position, counter_M)
    winner = tl.max(tl.where(is_bad_N, HIGHEST, pack(x_N, id_N)), 0)
    tl.store(winner_ptr + partial, winner)

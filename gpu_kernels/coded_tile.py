"""One program's part of decode attention over keys and values in codes, for few query rows.

Instructions are scarce here, not bytes, so codes go into products with as few as can be:

- q as two int8 parts (15 bits) multiplies int8 keys as they are stored. Both parts are rows of one
  product, which has twice as many as a group of eight heads needs; their sum lies in one thread.
- Values are the left operand, so that eight heads fill a product, and are read as int16: neighbours
  of two dims. Even and odd dims are products of their own (see ``widen_pairs``). The weights leave
  the softmax as that product wants them: no exchange between threads.
- Bytes of two four-bit codes are read once for two products each: of keys, whose int8 are 16 times
  the codes, with either half of q; of values, into either half of the sums. What keys are measured
  from counts with the sum of q, what values are measured from with the weights.
- Tiles begin at multiples of their size, so a tile is whole pages or lies within one: a number for
  each page, read a tile ahead, and the rest of the address constant. Only tiles at an end mask.
- What logits are measured against follows the largest only when a weight would exceed 2 ** 7, so
  few tiles rescale what there is, and a thread adds up the weights of its own tokens until the end.

Shapes: R query rows, Q rows of q's two parts, N cache tokens of a tile, P pages of a tile, C tokens
of these, D head dim (padded to a power of two, 32 at least), J pairs of dims.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.kv_widen import (
    CODE_OFFSET,
    CODE_UNIT,
    NIBBLE_OFFSET,
    half_as_int8,
    widen,
    widen_half_pairs,
    widen_pairs,
    zero_and_scale,
)
from gpu_kernels.paged_tile import join_halves, split_halves

MAX_ROWS = 16
MIN_DIM = 32  # of a product of int8

# What multiplies values is a weight times a scale, rounded to float16. With weights of up to 2 ** 7
# that keeps its precision for scales from 4e-6 to 511 (int8 values up to 65,000). Scales of four
# bits are 16 times as large and divided by that.
TOP = tl.constexpr(4.0)  # log2 of the largest key's weight, when the base was just taken
HIGHEST_BITS = tl.constexpr(0x40E00000)  # 7.0, above which it is taken anew; integers order alike
LOWEST = tl.constexpr(-1e30)  # below any logit; finite, so that differences are never NaN
UPPER = tl.constexpr(16.0)  # how much more a code in the upper half of a byte stands for
Q_STEPS = tl.constexpr(127 * 128)


@triton.jit
def attend_codes(
    q_QD,
    head_kv_ptr,
    head_scales_ptr,
    entries_ptr,
    begin,
    end,
    first,
    position_R,
    slope_R,
    stride_page: tl.constexpr,
    stride_v: tl.constexpr,
    stride_token: tl.constexpr,
    stride_scales,
    scale_log2,
    cap_log2,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_FP8: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    """Return the softmax state (base, sum, acc) of the keys of positions ``[begin, end)``.

    The base is what ``finish_softmax`` takes for the maximum. ``q_QD`` has every row twice, R rows
    apart. ``begin`` is a multiple of BLOCK_N and less than ``end``. Positions before ``first`` are
    not seen, nor with ``HAS_POSITIONS`` those after ``position_R``. ``entries_ptr``: the request's
    pages.
    """
    R: tl.constexpr = q_QD.shape[0] // 2
    P: tl.constexpr = BLOCK_N // PAGE_SIZE if BLOCK_N > PAGE_SIZE else 1
    C: tl.constexpr = BLOCK_N // P
    E: tl.constexpr = BLOCK_D // 2 if IS_INT4 else BLOCK_D
    STORED: tl.constexpr = HEAD_DIM // 2 if IS_INT4 else HEAD_DIM
    J: tl.constexpr = E // 2
    IS_ALIGNED: tl.constexpr = stride_page % 16 == 0 and stride_token % 16 == 0
    e_E = tl.arange(0, E)
    j_J = tl.arange(0, J)
    n_N = tl.arange(0, BLOCK_N)
    p_P = tl.arange(0, P)
    c_C = tl.arange(0, C)
    last_entry = (end - 1) // PAGE_SIZE
    page_P = tl.load(entries_ptr + tl.minimum(begin // PAGE_SIZE + p_P, last_entry))
    part_QE, scale_R = _two_parts(q_QD, scale_log2, IS_FP8)
    high_part_QE = part_QE
    if IS_INT4:
        q_sum_R = _sums_of_parts(part_QE) * UPPER
        part_QE, high_part_QE = split_halves(part_QE)
        scale_R = scale_R / UPPER
    factor_R = scale_R
    if HAS_CAP or HAS_ALIBI:
        factor_R = tl.full([R], 1.0, tl.float32)
    whole_end = end
    if HAS_POSITIONS:
        whole_end = tl.minimum(end, tl.min(position_R) + 1)
    pair_ptr = head_kv_ptr.to(tl.pointer_type(tl.int16)) + stride_v // 2

    base_R = tl.full([R], LOWEST, tl.float32)
    sum_RN = tl.zeros([R, BLOCK_N], tl.float32)
    even_JR = tl.zeros([J, R], tl.float32)
    odd_JR = tl.zeros([J, R], tl.float32)
    OFFSET: tl.constexpr = (NIBBLE_OFFSET if IS_INT4 else CODE_OFFSET) * CODE_UNIT
    minus_offset_JN = tl.full([J, BLOCK_N], -OFFSET, tl.float16)
    if IS_INT4:
        zero_R = tl.zeros([R], tl.float32)  # sums of what values are measured from
        high_even_JR = tl.zeros([J, R], tl.float32)
        high_odd_JR = tl.zeros([J, R], tl.float32)
        minus_high_offset_JN = tl.full([J, BLOCK_N], -OFFSET * UPPER, tl.float16)
    for tile_begin in range(begin, end, BLOCK_N):
        pos_N = tile_begin + n_N
        is_token_N = pos_N < end
        slot_C = c_C
        if PAGE_SIZE > BLOCK_N:
            slot_C += tile_begin % PAGE_SIZE
        page_P1 = page_P.to(tl.int64)[:, None]
        token_PC = page_P1 * stride_page + (slot_C.to(tl.int64) * stride_token)[None, :]
        token_N = tl.reshape(token_PC, [BLOCK_N])
        if IS_ALIGNED:
            token_N = tl.multiple_of(token_N, [16])
        scale_PC = page_P1 * (2 * stride_scales) + slot_C[None, :]
        scale_ptr_N = head_scales_ptr + tl.reshape(scale_PC, [BLOCK_N])
        next_entry_P = (tile_begin + BLOCK_N) // PAGE_SIZE + p_P
        page_P = tl.load(entries_ptr + tl.minimum(next_entry_P, last_entry))

        k_ptr_NE = head_kv_ptr + token_N[:, None] + e_E
        if STORED < E:
            k_NE = tl.load(k_ptr_NE, mask=(e_E < STORED)[None, :], other=0)
        else:
            k_NE = tl.load(k_ptr_NE)
        k_scale_N = tl.load(scale_ptr_N)
        # what is no token has weight 0, but its scale, and its codes in fp8, may be NaN
        v_scale_N = tl.load(scale_ptr_N + stride_scales, mask=is_token_N, other=0)
        v_ptr_JN = pair_ptr + (token_N // 2)[None, :] + j_J[:, None]
        if STORED < E:
            is_pair_J1 = (j_J < STORED // 2)[:, None]
            v_JN = tl.load(v_ptr_JN, mask=is_pair_J1 & is_token_N[None, :], other=0)
        elif IS_FP8:
            v_JN = tl.load(v_ptr_JN, mask=is_token_N[None, :], other=0)
        else:
            v_JN = tl.load(v_ptr_JN)

        logits_RN = _logits(part_QE, high_part_QE, k_NE, R, IS_FP8, IS_INT4)
        if IS_INT4:
            k_zero_N, k_scale_N = zero_and_scale(k_scale_N)
            v_zero_N, v_scale_N = zero_and_scale(v_scale_N)
            v_scale_N *= 1.0 / UPPER
            logits_RN = logits_RN * k_scale_N[None, :] + q_sum_R[:, None] * k_zero_N[None, :]
        else:
            logits_RN = logits_RN * k_scale_N[None, :]
        if HAS_CAP:
            logits_RN = logits_RN * scale_R[:, None]
            logits_RN = (1.0 - 2.0 / (tl.exp2(logits_RN) + 1.0)) * cap_log2
        if HAS_ALIBI:
            distance_RN = (pos_N[None, :] - position_R[:, None]).to(tl.float32)
            logits_RN = logits_RN * scale_R[:, None] + slope_R[:, None] * distance_RN
        if (tile_begin + BLOCK_N > whole_end) | (tile_begin < first):
            keep_RN = (is_token_N & (pos_N >= first))[None, :]
            if HAS_POSITIONS:
                keep_RN = keep_RN & (pos_N[None, :] <= position_R[:, None])
            logits_RN = tl.where(keep_RN, logits_RN, float("-inf"))
        exponent_RN = logits_RN * factor_R[:, None] - base_R[:, None]
        if tl.max(exponent_RN.to(tl.int32, bitcast=True)) > HIGHEST_BITS:
            new_base_R = tl.maximum(base_R, tl.max(logits_RN, 1) * factor_R - TOP)
            decay_R = tl.exp2(base_R - new_base_R)
            base_R = new_base_R
            sum_RN = sum_RN * decay_R[:, None]
            even_JR = even_JR * decay_R[None, :]
            odd_JR = odd_JR * decay_R[None, :]
            if IS_INT4:
                zero_R = zero_R * decay_R
                high_even_JR = high_even_JR * decay_R[None, :]
                high_odd_JR = high_odd_JR * decay_R[None, :]
            exponent_RN = logits_RN * factor_R[:, None] - base_R[:, None]
        p_RN = tl.exp2(exponent_RN)
        sum_RN += p_RN
        weight_RN = p_RN * v_scale_N[None, :]
        weight_NR = tl.trans(weight_RN.to(tl.float16))
        if not IS_FP8:
            # tile by tile, as sums of what is added would be rounded far more than those of values
            even_JR = tl.dot(minus_offset_JN, weight_NR, even_JR)
            odd_JR = tl.dot(minus_offset_JN, weight_NR, odd_JR)
        if IS_INT4:
            zero_R += tl.sum(p_RN * v_zero_N[None, :], 1)
            high_even_JR = tl.dot(minus_high_offset_JN, weight_NR, high_even_JR)
            high_odd_JR = tl.dot(minus_high_offset_JN, weight_NR, high_odd_JR)
            even_JR = tl.dot(widen_half_pairs(v_JN, HIGH=False, ODD=False), weight_NR, even_JR)
            odd_JR = tl.dot(widen_half_pairs(v_JN, HIGH=False, ODD=True), weight_NR, odd_JR)
            v_high_JN = widen_half_pairs(v_JN, HIGH=True, ODD=False)
            high_even_JR = tl.dot(v_high_JN, weight_NR, high_even_JR)
            v_high_JN = widen_half_pairs(v_JN, HIGH=True, ODD=True)
            high_odd_JR = tl.dot(v_high_JN, weight_NR, high_odd_JR)
        else:
            even_JR = tl.dot(widen_pairs(v_JN, IS_FP8, ODD=False), weight_NR, even_JR)
            odd_JR = tl.dot(widen_pairs(v_JN, IS_FP8, ODD=True), weight_NR, odd_JR)

    acc_RD = _in_order(even_JR, odd_JR)
    if IS_INT4:
        acc_RD = join_halves(acc_RD * UPPER, _in_order(high_even_JR, high_odd_JR))
    if not IS_FP8:
        acc_RD *= 1.0 / CODE_UNIT
    if IS_INT4:
        acc_RD += zero_R[:, None]
    return base_R, tl.sum(sum_RN, 1), acc_RD


@triton.jit
def _in_order(even_JR, odd_JR):
    """Even and odd columns as one, a row for each of R."""
    J: tl.constexpr = even_JR.shape[0]
    R: tl.constexpr = even_JR.shape[1]
    return tl.reshape(tl.permute(tl.join(even_JR, odd_JR), (1, 0, 2)), [R, 2 * J])


@triton.jit
def _sums_of_parts(part_QD):
    """q's sum over its dims, [R], in units of the scales."""
    R: tl.constexpr = part_QD.shape[0] // 2
    sum_Q = tl.sum(part_QD.to(tl.int32), 1)
    high_R, low_R = tl.split(tl.permute(tl.reshape(sum_Q, [2, R]), (1, 0)))
    return (high_R * 128 + low_R).to(tl.float32)


@triton.jit
def _two_parts(q_QD, scale_log2, IS_FP8: tl.constexpr):
    """Return the first part of q in the first R rows and the second in the others, and the scales.

    ``q_QD`` has each row in both places; the scales ``[R]`` are those of the rows' logits.
    """
    R: tl.constexpr = q_QD.shape[0] // 2
    q_QD = q_QD.to(tl.float32)
    # as integers, among which NaN is the largest: it must not get lost
    largest_Q = tl.max(tl.abs(q_QD).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    largest_Q = tl.where(largest_Q == 0.0, 1.0, largest_Q)
    scale_R = tl.max(tl.reshape(largest_Q, [2, R]), 0) * scale_log2
    inverse_Q1 = (1.0 / largest_Q)[:, None]
    is_low_Q1 = (tl.arange(0, 2 * R) >= R)[:, None]
    if IS_FP8:
        unit_QD = q_QD * inverse_Q1
        high_QD = unit_QD.to(tl.float16)
        low_QD = (unit_QD - high_QD.to(tl.float32)).to(tl.float16)
        return tl.where(is_low_Q1, low_QD, high_QD), scale_R
    else:
        steps_QD = tl.floor(q_QD * (inverse_Q1 * Q_STEPS) + 0.5).to(tl.int32)
        high_QD = (steps_QD + 64) >> 7
        part_QD = tl.where(is_low_Q1, steps_QD - high_QD * 128, high_QD)
        return part_QD.to(tl.int8), scale_R / Q_STEPS


@triton.jit
def _logits(
    part_QE, high_part_QE, k_NE, R: tl.constexpr, IS_FP8: tl.constexpr, IS_INT4: tl.constexpr
):
    """Both parts' products with the keys, added up: ``[R, N]``, in units of the scales."""
    N: tl.constexpr = k_NE.shape[0]
    if IS_INT4:
        logits_QN = tl.dot(part_QE, tl.trans(half_as_int8(k_NE, HIGH=False)))
        k_high_NE = half_as_int8(k_NE, HIGH=True)
        logits_QN = tl.dot(high_part_QE, tl.trans(k_high_NE), logits_QN, out_dtype=tl.int32)
    else:
        if IS_FP8:
            k_NE = widen(k_NE, tl.float16, IN_PLACE=True)
        logits_QN = tl.dot(part_QE, tl.trans(k_NE))
    high_RN, low_RN = tl.split(tl.permute(tl.reshape(logits_QN, [2, R, N]), (1, 2, 0)))
    if IS_FP8:
        return high_RN + low_RN
    else:
        return (high_RN * 128 + low_RN).to(tl.float32)

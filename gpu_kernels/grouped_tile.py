"""One program's share of the grouped products: some weight rows times a tile of a slot's pairs.

Programs find their slot from the grouping, so that no number of pairs is known on the host.
Shapes: N columns (pairs) of a tile, F more that its slot's last tile may take, B bins (slots padded
to a power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl

from gpu_kernels.expert_tile import expert_tile


@triton.jit
def _find_group(first_ptr, group, num_slots, N: tl.constexpr, F: tl.constexpr, BINS: tl.constexpr):
    """The slot that the ``group``-th tile of columns belongs to, its first pair, and their number.

    The slot's pairs are counted from there to its end: N belong to the tile, or all if they are at
    most N + F. Beyond the last tile the slot is not less than ``num_slots``.
    """
    slot_B = tl.arange(0, BINS)
    first_B = tl.load(first_ptr + slot_B, mask=slot_B < num_slots, other=0)
    end_B = tl.load(first_ptr + 1 + slot_B, mask=slot_B < num_slots, other=0)
    num_B = end_B - first_B
    tiles_B = tl.where(num_B > 0, tl.maximum((num_B - F + N - 1) // N, 1), 0)
    is_before_B = tl.cumsum(tiles_B, 0) <= group
    slot = tl.sum(is_before_B.to(tl.int32), 0)
    tiles_before = tl.sum(tl.where(is_before_B, tiles_B, 0), 0)
    first = tl.sum(tl.where(slot_B == slot, first_B, 0), 0) + (group - tiles_before) * N
    return slot, first, tl.sum(tl.where(slot_B == slot, end_B, 0), 0) - first


# the slots are arguments, since each layer may hold another number of them
@triton.jit(do_not_specialize=["first_slot", "num_slots", "num_groups"])
def grouped_kernel(
    x_ptr,
    pair_ptr,
    first_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    stride_slot,
    first_slot,
    num_slots,
    num_groups,
    BINS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NEAR: tl.constexpr,
    SPEC: tl.constexpr,
    FEW: tl.constexpr,
):
    # programs that run together share weights and columns in L2: NEAR column tiles times some rows
    program = tl.program_id(0)
    first_group = program // (NEAR * NUM_TILES) * NEAR
    num_near = tl.minimum(num_groups - first_group, NEAR)
    inside = program % (NEAR * NUM_TILES)
    N: tl.constexpr = SPEC.columns
    F: tl.constexpr = FEW.columns
    group = first_group + inside % num_near
    slot, first, num = _find_group(first_ptr + first_slot, group, num_slots, N, F, BINS)
    if slot >= num_slots:
        return
    tile = inside // num_near
    w_ptr += slot.to(tl.int64) * stride_slot
    if bias_ptr is not None:
        bias_ptr += slot * (2 * SPEC.rows if SPEC.paired else SPEC.rows)
    if num <= F:
        _compute(
            w_ptr, bias_ptr, x_ptr, out_ptr, pair_ptr, tile, first, num, stride_x, TOP_K, FEW, 0
        )
    elif (num <= N) | (num > N + F):
        _compute(
            w_ptr, bias_ptr, x_ptr, out_ptr, pair_ptr, tile, first, num, stride_x, TOP_K, SPEC, 0
        )
    else:
        _compute(
            w_ptr, bias_ptr, x_ptr, out_ptr, pair_ptr, tile, first, num, stride_x, TOP_K, SPEC, F
        )


@triton.jit
def _compute(
    w_ptr,
    bias_ptr,
    x_ptr,
    out_ptr,
    pair_ptr,
    tile,
    first,
    num,
    stride_x,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    MORE: tl.constexpr,
):
    """Tile ``tile`` of one slot's weights times up to N + MORE of its ``num`` pairs from one on."""
    column_N = tl.arange(0, SPEC.columns)
    x_offset_N, out_offset_N = _find_columns(pair_ptr, first, column_N, num, stride_x, TOP_K, SPEC)
    x_offset_F, out_offset_F, is_used_F = None, None, None
    if MORE > 0:
        column_F = SPEC.columns + tl.arange(0, MORE)
        x_offset_F, out_offset_F = _find_columns(
            pair_ptr, first, column_F, num, stride_x, TOP_K, SPEC
        )
        is_used_F = column_F < num
    expert_tile(
        w_ptr,
        bias_ptr,
        x_ptr,
        out_ptr,
        tile,
        0,
        None,
        x_offset_N,
        out_offset_N,
        column_N < num,
        SPEC,
        x_offset_F,
        out_offset_F,
        is_used_F,
    )


@triton.jit
def _find_columns(
    pair_ptr, first, column_N, num, stride_x, TOP_K: tl.constexpr, SPEC: tl.constexpr
):
    """Where the columns' input and output rows begin: between the launches, in the pairs' order."""
    place_N = first + column_N
    pair_N = tl.load(pair_ptr + place_N, mask=column_N < num, other=0)
    if SPEC.paired:
        return (pair_N // TOP_K).to(tl.int64) * stride_x, place_N.to(tl.int64) * SPEC.rows
    else:
        return place_N.to(tl.int64) * stride_x, pair_N.to(tl.int64) * SPEC.rows

"""Resident experts for many tokens: grouped matrix products over pairs sorted by slot.

Launches: two group the pairs (``expert_grouping``), one computes gate, up and activation, one the
down projection, one adds each token's choices up in their order. No host sync, no atomics.
Shapes: T tokens, K choices of a token, P = T * K pairs, E experts, S slots, H hidden, I width;
in kernels N columns (pairs) of a tile, B slots padded to a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.expert_config import ExpertConfig, prefill_config
from gpu_kernels.expert_grouping import Grouping, group_pairs
from gpu_kernels.expert_reference import experts_reference
from gpu_kernels.expert_tile import expert_tile
from gpu_kernels.expert_weights import ExpertLayer, check_routing, matrix_views
from gpu_kernels.sum_choices import sum_choices_of_tokens
from gpu_kernels.tile_spec import Matrix, TileConfig, tile_spec


@dataclass(frozen=True, slots=True)
class GroupedWorkspace:
    """Scratch between the launches, in x's dtype; one per stream."""

    act_PI: Tensor
    part_PH: Tensor

    @classmethod
    def make(
        cls, layer: ExpertLayer, num_pairs: int, dtype: torch.dtype = torch.bfloat16
    ) -> GroupedWorkspace:
        """For up to ``num_pairs`` pairs of layers of this one's sizes, x of ``dtype``."""
        device = layer.device
        return cls(
            torch.empty((num_pairs, layer.width), dtype=dtype, device=device),
            torch.empty((num_pairs, layer.hidden), dtype=dtype, device=device),
        )


def grouped_experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    layer: ExpertLayer,
    *,
    out: Tensor | None = None,
    workspace: GroupedWorkspace | None = None,
    config: ExpertConfig | None = None,
) -> Tensor:
    """Return the sum over a token's resident experts of weight * expert(x), float32 ``[T, H]``.

    Arguments as for ``expert_decode``, for any number of tokens. An expert's output is rounded to
    x's dtype before the sum.
    """
    check_routing(layer, x_TH, ids_TK, weights_TK, slot_E)
    num_pairs = ids_TK.numel()
    if out is None:
        out = torch.empty(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    assert out.shape == x_TH.shape and out.dtype == torch.float32 and out.stride(1) == 1
    if num_pairs == 0:
        return out
    if workspace is None:
        workspace = GroupedWorkspace.make(layer, num_pairs, x_TH.dtype)
    act, part = workspace.act_PI, workspace.part_PH
    for scratch, cols in ((act, layer.width), (part, layer.hidden)):
        assert scratch.shape[0] >= num_pairs and scratch.shape[1] == cols
        assert scratch.dtype == x_TH.dtype and scratch.is_contiguous()
        assert scratch.device == x_TH.device
    if config is None:
        config = prefill_config(layer, num_pairs, x_TH.dtype)
    groups = group_pairs(ids_TK, slot_E, layer.num_slots)
    _launch("w13", x_TH, ids_TK, groups, layer, act, config.gate_up)
    _launch("w2", act, ids_TK, groups, layer, part, config.down)
    sum_choices_of_tokens(part, ids_TK, weights_TK, slot_E, out)
    return out


def grouped_experts_reference(
    x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, slot_E: Tensor, layer: ExpertLayer
) -> Tensor:
    """The same in plain torch, computed and returned in float32."""
    return experts_reference(x_TH, ids_TK, weights_TK, slot_E, layer)


def _launch(
    matrix: Matrix,
    x: Tensor,
    ids_TK: Tensor,
    groups: Grouping,
    layer: ExpertLayer,
    out: Tensor,
    config: TileConfig,
) -> None:
    """One product for all pairs: rows of x are tokens for w13 and pairs for w2."""
    spec = tile_spec(layer, matrix, config)
    w13, w2 = matrix_views(layer.weights)
    weights, bias = (w13, layer.b13_SF) if spec.paired else (w2, layer.b2_SH)
    # a slot's last tile may be partly empty: one more tile each is always enough
    num_groups = triton.cdiv(ids_TK.numel(), config.columns) + layer.num_slots
    _grouped_kernel[(num_groups * spec.num_tiles,)](
        x,
        groups.pair_P,
        groups.first_S1,
        weights,
        bias,
        out,
        x.stride(0),
        weights.stride(0),
        num_groups,
        NUM_SLOTS=layer.num_slots,
        TOP_K=ids_TK.shape[1],
        NUM_TILES=spec.num_tiles,
        NEAR=config.near,
        SPEC=spec,
        **config.launch,
    )


@triton.jit
def _find_group(first_ptr, group, NUM_SLOTS: tl.constexpr, N: tl.constexpr):
    """The slot that the ``group``-th tile of columns belongs to, and its pairs' first and end.

    Beyond the last tile the slot is not less than NUM_SLOTS.
    """
    B: tl.constexpr = triton.next_power_of_2(NUM_SLOTS)
    slot_B = tl.arange(0, B)
    first_B = tl.load(first_ptr + slot_B, mask=slot_B < NUM_SLOTS, other=0)
    end_B = tl.load(first_ptr + 1 + slot_B, mask=slot_B < NUM_SLOTS, other=0)
    tiles_B = (end_B - first_B + N - 1) // N
    is_before_B = tl.cumsum(tiles_B, 0) <= group
    slot = tl.sum(is_before_B.to(tl.int32), 0)
    tiles_before = tl.sum(tl.where(is_before_B, tiles_B, 0), 0)
    first = tl.sum(tl.where(slot_B == slot, first_B, 0), 0) + (group - tiles_before) * N
    return slot, first, tl.sum(tl.where(slot_B == slot, end_B, 0), 0)


@triton.jit(do_not_specialize=["num_groups"])
def _grouped_kernel(
    x_ptr,
    pair_ptr,
    first_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    stride_x,
    stride_slot,
    num_groups,
    NUM_SLOTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_TILES: tl.constexpr,
    NEAR: tl.constexpr,
    SPEC: tl.constexpr,
):
    # programs that run together share weights and columns in L2: NEAR column tiles times some rows
    program = tl.program_id(0)
    first_group = program // (NEAR * NUM_TILES) * NEAR
    num_near = tl.minimum(num_groups - first_group, NEAR)
    inside = program % (NEAR * NUM_TILES)
    N: tl.constexpr = SPEC.columns
    slot, first, end = _find_group(first_ptr, first_group + inside % num_near, NUM_SLOTS, N)
    if slot >= NUM_SLOTS:
        return
    place_N = first + tl.arange(0, N)
    is_used_N = place_N < end
    pair_N = tl.load(pair_ptr + place_N, mask=is_used_N, other=0)
    x_row_N = pair_N // TOP_K if SPEC.paired else pair_N
    BIAS: tl.constexpr = 2 * SPEC.rows if SPEC.paired else SPEC.rows
    expert_tile(
        w_ptr + slot.to(tl.int64) * stride_slot,
        bias_ptr + slot * BIAS if bias_ptr is not None else None,
        x_ptr,
        out_ptr,
        inside // num_near,
        x_row_N.to(tl.int64) * stride_x,
        pair_N.to(tl.int64) * SPEC.rows,
        is_used_N,
        SPEC,
    )

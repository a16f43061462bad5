"""Resident experts for a few tokens: two launches that read every routed weight once.

A program belongs to a (token, choice) pair and some weight rows. The first pair of an expert
computes for all tokens that chose it, the other pairs' programs return at once. The second launch
writes a pair's row in one or more partial sums; the last program to finish some rows adds a token's
choices up in their order. So a token's result depends on nothing but that token, to the bit. Of
each expert only the last rows of gate and up, and columns of w2, may be computed, from one on that
is data: programs whose rows would be others return at once, or add nothing.
Shapes: T tokens, K choices of a token, P = T * K pairs, E experts, S slots, H hidden, I width;
in kernels M weight rows of a tile, N columns (tokens, padded), C choices (padded).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.dependent_launch import dependent, let_next_start, wait_for_last
from gpu_kernels.expert_config import ExpertConfig, decode_config
from gpu_kernels.expert_reference import experts_reference
from gpu_kernels.expert_tile import expert_tile
from gpu_kernels.expert_weights import ExpertLayer, check_routing, matrix_views
from gpu_kernels.expert_workspace import DecodeWorkspace
from gpu_kernels.last_rows import LastRows
from gpu_kernels.sum_choices import sum_choices
from gpu_kernels.tile_spec import tile_spec

__all__ = ["DecodeWorkspace", "expert_decode", "expert_decode_reference"]

MAX_TOKENS = 32
MAX_TOP_K = 16


def expert_decode(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    layer: ExpertLayer,
    *,
    last_rows: LastRows | None = None,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    config: ExpertConfig | None = None,
) -> Tensor:
    """Return the sum over a token's resident experts of weight * expert(x), float32 ``[T, H]``.

    ``ids_TK`` int32, -1 or an index into ``slot_E`` (int32: the expert's slot, -1 where it is not
    resident); no expert twice in a token; ``weights_TK`` float32. A token without resident experts
    gets zeros. T is 32 at most, K 16. ``last_rows``: the sums over this part of every expert; None:
    over all of it. Safe in a CUDA graph; one workspace per stream.
    """
    check_routing(layer, x_TH, ids_TK, weights_TK, slot_E)
    if last_rows is not None:
        last_rows.check(layer, ids_TK)
    num_tokens, top_k = ids_TK.shape
    assert num_tokens <= MAX_TOKENS and top_k <= MAX_TOP_K, (num_tokens, top_k)
    if out is None:
        out = torch.empty(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    assert out.shape == x_TH.shape and out.dtype == torch.float32 and out.stride(1) == 1
    if num_tokens == 0:
        return out
    if config is None:
        config = decode_config(layer, num_tokens, x_TH.dtype)
    if workspace is None:
        workspace = DecodeWorkspace.make(layer, num_tokens * top_k, x_TH.dtype, config)
    workspace.check(layer, num_tokens * top_k, x_TH.dtype, config)
    assert num_tokens <= min(config.gate_up.columns, config.down.columns)
    _launch(x_TH, ids_TK, weights_TK, slot_E, layer, last_rows, out, workspace, config)
    return out


def expert_decode_reference(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    layer: ExpertLayer,
    *,
    last_rows: LastRows | None = None,
) -> Tensor:
    """The same in plain torch, computed and returned in float32."""
    first_TK = None if last_rows is None else last_rows.first_TK
    return experts_reference(x_TH, ids_TK, weights_TK, slot_E, layer, first_TK=first_TK)


def _launch(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    layer: ExpertLayer,
    last_rows: LastRows | None,
    out: Tensor,
    workspace: DecodeWorkspace,
    config: ExpertConfig,
) -> None:
    num_tokens, top_k = ids_TK.shape
    w13, w2 = matrix_views(layer.weights)
    first, most, unit = None, layer.width, 0
    if last_rows is not None:
        first, most, unit = last_rows.first_TK, last_rows.most, last_rows.unit
    spec = tile_spec(layer, "w13", config.gate_up, unit)
    _gate_up_kernel[(spec.num_tiles(most), ids_TK.numel())](
        x_TH,
        ids_TK,
        slot_E,
        w13,
        layer.b13_SF,
        first,
        workspace.act_PI,
        x_TH.stride(0),
        w13.stride(0),
        num_tokens,
        TOP_K=top_k,
        SPEC=spec,
        **config.gate_up.launch,
        **dependent(x_TH.device),
    )
    spec = tile_spec(layer, "w2", config.down, unit)
    _down_kernel[(spec.num_tiles(spec.rows), ids_TK.numel() * spec.splits)](
        workspace.act_PI,
        ids_TK,
        weights_TK,
        slot_E,
        w2,
        layer.b2_SH,
        first,
        workspace.part_PSH,
        workspace.done,
        out,
        w2.stride(0),
        out.stride(0),
        num_tokens,
        TOP_K=top_k,
        SPEC=spec,
        **config.down.launch,
        **dependent(x_TH.device),
    )


@triton.jit
def _find_columns(ids_ptr, slot_ptr, pair, num_tokens, TOP_K: tl.constexpr, N: tl.constexpr):
    """The slot of the pair's expert and each token's pair with that expert (-1: none).

    The slot is -1 if the expert is not resident or an earlier pair has it too.
    """
    C: tl.constexpr = triton.next_power_of_2(TOP_K)
    expert = tl.load(ids_ptr + pair)
    slot = tl.load(slot_ptr + expert, mask=expert >= 0, other=-1)
    token_N = tl.arange(0, N)
    choice_C = tl.arange(0, C)
    mask_NC = (token_N < num_tokens)[:, None] & (choice_C < TOP_K)[None, :]
    pair_NC = token_N[:, None] * TOP_K + choice_C[None, :]
    ids_NC = tl.load(ids_ptr + pair_NC, mask=mask_NC, other=-1)
    is_here_NC = mask_NC & (ids_NC == expert)
    pair_N = tl.max(tl.where(is_here_NC, pair_NC, -1), 1)
    first = tl.min(tl.where(pair_N >= 0, pair_N, N * TOP_K), 0)
    return tl.where(first == pair, slot, -1), pair_N


@triton.jit
def _load_first(first_ptr, SPEC: tl.constexpr):
    """The first row that is computed of a pair's expert."""
    # a product with a known factor tells the compiler how addresses are aligned; rounded up, since
    # a width that is no multiple of it stands for no rows at all
    return (tl.load(first_ptr) + SPEC.unit - 1) // SPEC.unit * SPEC.unit


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up_kernel(
    x_ptr,
    ids_ptr,
    slot_ptr,
    w_ptr,
    bias_ptr,
    first_ptr,
    act_ptr,
    stride_x,
    stride_slot,
    num_tokens,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    pair = tl.program_id(1)
    slot, pair_N = _find_columns(ids_ptr, slot_ptr, pair, num_tokens, TOP_K, SPEC.columns)
    first = None
    if first_ptr is not None:
        first = _load_first(first_ptr + pair, SPEC)
        slot = tl.where(first + tl.program_id(0) * SPEC.tile_rows < SPEC.rows, slot, -1)
    if slot < 0:
        return
    expert_tile(
        w_ptr + slot.to(tl.int64) * stride_slot,
        bias_ptr + slot * (2 * SPEC.rows) if bias_ptr is not None else None,
        x_ptr,
        act_ptr,
        tl.program_id(0),
        0,
        first,
        tl.arange(0, SPEC.columns).to(tl.int64) * stride_x,
        pair_N.to(tl.int64) * SPEC.rows,
        pair_N >= 0,
        SPEC,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _down_kernel(
    act_ptr,
    ids_ptr,
    weight_ptr,
    slot_ptr,
    w_ptr,
    bias_ptr,
    first_ptr,
    part_ptr,
    done_ptr,
    out_ptr,
    stride_slot,
    stride_out,
    num_tokens,
    TOP_K: tl.constexpr,
    SPEC: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    wait_for_last(DEPENDENT)
    SPLITS: tl.constexpr = SPEC.splits
    tile = tl.program_id(0)
    pair = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    first = None
    if first_ptr is not None:
        first = _load_first(first_ptr + pair, SPEC)
    slot, pair_N = _find_columns(ids_ptr, slot_ptr, pair, num_tokens, TOP_K, SPEC.columns)
    if slot >= 0:
        expert_tile(
            w_ptr + slot.to(tl.int64) * stride_slot,
            bias_ptr + slot * SPEC.rows if bias_ptr is not None else None,
            act_ptr,
            part_ptr,
            tile,
            split,
            first,
            pair_N.to(tl.int64) * SPEC.depth,
            (pair_N.to(tl.int64) * SPLITS + split) * SPEC.rows,
            pair_N >= 0,
            SPEC,
        )
    # every thread's rows are written before one thread says so; whoever is last sees all
    tl.debug_barrier()
    num_done = tl.atomic_add(done_ptr + tile, 1, sem="acq_rel")
    if num_done == tl.num_programs(1) - 1:
        tl.store(done_ptr + tile, 0)
        token_N = tl.arange(0, SPEC.columns)
        h_H = tile * (2 * SPEC.tile_rows) + tl.arange(0, 2 * SPEC.tile_rows)
        is_token_N = token_N < num_tokens
        sum_NH = sum_choices(
            part_ptr,
            ids_ptr,
            weight_ptr,
            slot_ptr,
            token_N,
            is_token_N,
            h_H,
            SPEC.rows,
            TOP_K,
            SPLITS,
        )
        out_offset_NH = token_N.to(tl.int64)[:, None] * stride_out + h_H[None, :]
        mask_NH = is_token_N[:, None] & (h_H < SPEC.rows)[None, :]
        tl.store(out_ptr + out_offset_NH, sum_NH, mask=mask_NH)

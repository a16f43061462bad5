"""Resident experts in plain torch and float32: what every expert kernel must agree with.

Shapes: T tokens, K choices of a token, E experts, S slots, H hidden, I width, F = 2I, R = T * K
pairs of one expert, N rows and D columns of a matrix, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.expert_weights import (
    BLOCK_ROWS,
    DenseWeights,
    ExpertLayer,
    PackedLayout,
    PackedWeights,
)
from gpu_kernels.gated_activation import activate_reference
from gpu_kernels.lossless_reference import lossless_matrix


def experts_reference(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    layer: ExpertLayer,
    *,
    first_TK: Tensor | None = None,
) -> Tensor:
    """Sum over a token's resident experts of weight * expert(x), float32 ``[T, H]``.

    Of gate and up only the rows from ``first_TK`` on are computed, of w2 these columns.
    """
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    slot_TK = slot_E[ids_TK.clamp(min=0).long()].masked_fill(ids_TK < 0, -1)
    for slot in slot_TK[slot_TK >= 0].unique().tolist():
        token_R, choice_R = (slot_TK == slot).nonzero(as_tuple=True)
        first_row = 0 if first_TK is None else int(first_TK[token_R[0], choice_R[0]])
        expert_RH = _expert(x_TH[token_R].float(), slot, layer, first_row)
        out_TH.index_add_(0, token_R, weights_TK[token_R, choice_R, None] * expert_RH)
    return out_TH


def _expert(x_RH: Tensor, slot: int, layer: ExpertLayer, first_row: int) -> Tensor:
    w13_FH, w2_HI = slot_matrices(layer.weights, slot)
    both_RF = x_RH @ w13_FH.T
    if layer.b13_SF is not None:
        both_RF = both_RF + layer.b13_SF[slot]
    gate_RI, up_RI = both_RF.chunk(2, dim=1)
    act_RI = activate_reference(gate_RI, up_RI, layer.activation)
    out_RH = act_RI[:, first_row:] @ w2_HI[:, first_row:].T
    return out_RH if layer.b2_SH is None else out_RH + layer.b2_SH[slot]


def slot_matrices(weights: DenseWeights | PackedWeights, slot: int) -> tuple[Tensor, Tensor]:
    """``w13 [F, H]`` and ``w2 [H, I]`` of one slot, float32."""
    if isinstance(weights, DenseWeights):
        return weights.w13_SFH[slot].float(), weights.w2_SHI[slot].float()
    layout, blob = weights.layout, weights.blob_SB[slot]
    hidden, width = layout.hidden, layout.width
    both = blob[: layout.w2_offset].unflatten(0, (-1, 2, layout.block_bytes(hidden)))
    gate_IH, up_IH = (_matrix(both[:, half], layout, hidden)[:width] for half in (0, 1))
    down = blob[layout.w2_offset : layout.expert_bytes]
    down_HI = _matrix(down.unflatten(0, (-1, layout.block_bytes(width))), layout, width)
    return torch.cat([gate_IH, up_IH]), down_HI[:hidden]


def _matrix(blocks: Tensor, layout: PackedLayout, cols: int) -> Tensor:
    """Blocks of 16 rows, uint8 ``[blocks, block_bytes]``, as float32 rows."""
    if layout.bits == 12:
        return lossless_matrix(blocks, layout.scale_offset(cols))[:, :cols]
    scale_at, zero_at = layout.scale_offset(cols), layout.zero_offset(cols)
    codes = blocks[:, :scale_at].unflatten(1, (-1, BLOCK_ROWS, 4)).transpose(1, 2)
    if layout.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=3)
    codes_ND = codes.flatten(0, 1).flatten(1).float()
    scales = blocks[:, scale_at:zero_at].contiguous().view(layout.scale_dtype)
    scale_NG = scales.unflatten(1, (-1, BLOCK_ROWS)).transpose(1, 2).flatten(0, 1).float()
    zero_NG = torch.full_like(scale_NG, 1 << (layout.bits - 1))
    if layout.has_zeros:
        zeros = blocks[:, zero_at : zero_at + BLOCK_ROWS * scale_NG.shape[1]]
        zero_NG = zeros.unflatten(1, (-1, BLOCK_ROWS)).transpose(1, 2).flatten(0, 1).float()
    scale_ND, zero_ND = (t.repeat_interleave(layout.group, 1) for t in (scale_NG, zero_NG))
    return torch.mul(scale_ND, codes_ND - zero_ND)[:, :cols]

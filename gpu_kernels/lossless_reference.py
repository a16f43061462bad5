"""bf12 blocks in plain torch.

Shapes: B blocks of 16 rows, N = 16 B rows, K columns, L entries of a block, R rows of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.expert_weights import BLOCK_ROWS, PackedLayout


def lossless_matrix(blocks: Tensor, layout: PackedLayout, cols: int) -> Tensor:
    """Blocks, uint8 ``[B, block_bytes]``, as float32 rows ``[N, K]``, to the bit."""
    scale_at = layout.scale_offset(cols)
    words = blocks[:, :scale_at].contiguous().view(torch.int32)
    planes = words.unflatten(1, (-1, 3, 8, BLOCK_ROWS)).unbind(2)
    w0, w1, w2 = (plane.flatten(1, 2) for plane in planes)  # [B, steps, rows]
    last = w0 >> 4 & 0x07800780 | w1 >> 8 & 0x00780078
    last |= w2 >> 11 & 0x00070007 | (w2 & 0x40004000) << 1
    pairs = torch.stack([w0, w1, w2, last], dim=3) & -0x78007801  # 0x87FF87FF
    halves = torch.stack([pairs << 16, pairs & -0x10000], dim=4)
    weights_NK = halves.transpose(1, 2).flatten(2).flatten(0, 1).view(torch.float32)
    scale_NK = blocks[:, scale_at : scale_at + 32].contiguous().view(torch.bfloat16).view(-1, 1)
    weights_NK = weights_NK * scale_NK.float()
    _fill_exceptions(weights_NK, blocks[:, scale_at + 32 :].contiguous())
    return weights_NK[:, :cols]


def _fill_exceptions(weights_NK: Tensor, lists: Tensor) -> None:
    """Put every block's list into its rows."""
    end_BR = lists[:, :32].contiguous().view(torch.int16).int() & 0xFFFF
    entry_BL = lists[:, 32:].contiguous().view(torch.int32)
    e_L = torch.arange(entry_BL.shape[1], device=lists.device)
    block, e = (e_L < end_BR[:, -1:]).nonzero(as_tuple=True)
    row = block * BLOCK_ROWS + (end_BR[block] <= e[:, None]).sum(1)
    entry = entry_BL[block, e]
    weights_NK[row, (entry & 0xFFFF).long()] = (entry & -0x10000).view(torch.float32)

"""bf12 blocks in plain torch.

Shapes: X blocks of 16 rows, N = 16 X rows, P columns padded to groups of 64, S steps of 8 columns,
W words of a step, L entries of a block, R rows of a block, E exceptions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.expert_weights import BLOCK_ROWS

WORDS, STEPS = 3, 8  # of a step; of a group
PAIR = 0x87FF87FF - (1 << 32)  # what a word has of its own two weights


def lossless_matrix(blocks_X: Tensor, code_bytes: int) -> Tensor:
    """Blocks, uint8 ``[X, block_bytes]``, as float32 rows ``[N, P]``, to the bit.

    ``code_bytes``: of a block, before its scales.
    """
    behind = code_bytes + 2 * BLOCK_ROWS
    words_NSW = _rows_of_words(blocks_X[:, :code_bytes].contiguous().view(torch.int32))
    first, second, third = words_NSW.unbind(2)
    last = first >> 4 & 0x07800780 | second >> 8 & 0x00780078
    last |= third >> 11 & 0x00070007 | (third & 0x40004000) << 1
    pairs_NS4 = torch.cat([words_NSW, last[:, :, None]], dim=2) & PAIR
    scales_N = blocks_X[:, code_bytes:behind].contiguous().view(torch.bfloat16).flatten()
    weights_NP = pairs_NS4.flatten(1).view(torch.bfloat16).float() * scales_N[:, None].float()
    _put_exceptions(weights_NP, blocks_X[:, behind:])
    return weights_NP


def _rows_of_words(words_X: Tensor) -> Tensor:
    """Words of blocks by row and step, ``[N, S, W]``."""
    groups = words_X.view(len(words_X), -1, WORDS, STEPS, BLOCK_ROWS).permute(0, 4, 1, 3, 2)
    return groups.reshape(BLOCK_ROWS * len(words_X), -1, WORDS)


def _put_exceptions(weights_NP: Tensor, lists_X: Tensor) -> None:
    """Write those of every block, whose ends and entries are ``lists_X``."""
    end_XR = lists_X[:, : 2 * BLOCK_ROWS].contiguous().view(torch.int16).int() & 0xFFFF
    entry_XL = lists_X[:, 2 * BLOCK_ROWS :].contiguous().view(torch.int32)
    place_L = torch.arange(entry_XL.shape[1], device=lists_X.device)
    block_E, place_E = (place_L < end_XR[:, -1:]).nonzero(as_tuple=True)
    row_E = block_E * BLOCK_ROWS + (end_XR[block_E] <= place_E[:, None]).sum(1)
    entry_E = entry_XL[block_E, place_E]
    weights_NP[row_E, (entry_E & 0xFFFF).long()] = (entry_E & -0x10000).view(torch.float32)

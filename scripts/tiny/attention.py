"""Packed rows on the device, and causal attention within their documents.

FlexAttention on CUDA, plain attention with a mask on the CPU.

Shape suffixes: R rows, S positions, J blocks of 128 positions, N query heads, G KV heads, D head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from scripts.tiny.rows import Rows

_BLOCK = 128


def to_device(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """Copy the arrays of ``rows`` to ``device``."""
    arrays = {
        "ids": rows.ids_RS,
        "targets": rows.targets_RS,
        "weights": rows.weights_RS,
        "documents": rows.documents_RS,
    }
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def document_mask(documents_RS: Tensor) -> BlockMask | Tensor:
    """Return the mask that keeps each position to its own document and the past."""
    if documents_RS.is_cuda:
        return block_mask(documents_RS)
    return (documents_RS[:, :, None] == documents_RS[:, None, :]).tril()[:, None]


def attend(q_RNSD: Tensor, k_RGSD: Tensor, v_RGSD: Tensor, mask: BlockMask | Tensor) -> Tensor:
    """Return the attention output of [R, N, S, D]."""
    if isinstance(mask, BlockMask):
        mixed = flex_attention(q_RNSD, k_RGSD, v_RGSD, block_mask=mask, enable_gqa=True)
        assert isinstance(mixed, Tensor)
        return mixed
    return F.scaled_dot_product_attention(q_RNSD, k_RGSD, v_RGSD, attn_mask=mask, enable_gqa=True)


def block_mask(documents_RS: Tensor) -> BlockMask:
    """Return the blocks that can interact; documents are numbered upwards along a row.

    A block pair is needed when the first document of the query block is not past the last one of
    the key block. The exact mask is then applied inside of each block.
    """
    num_blocks = documents_RS.shape[1] // _BLOCK
    assert documents_RS.shape[1] == num_blocks * _BLOCK
    blocks_RJB = documents_RS.view(-1, num_blocks, _BLOCK)
    first_RJ, last_RJ = blocks_RJB[..., 0], blocks_RJB[..., -1]
    needed_RJJ = (first_RJ[:, :, None] <= last_RJ[:, None, :]).tril()
    counts_RJ = needed_RJJ.sum(-1, dtype=torch.int32)
    order_RJJ = needed_RJJ.to(torch.int8).argsort(dim=-1, descending=True, stable=True)

    def in_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_RS[row, query] == documents_RS[row, key])

    return BlockMask.from_kv_blocks(
        counts_RJ[:, None],
        order_RJJ[:, None].to(torch.int32),
        BLOCK_SIZE=_BLOCK,
        mask_mod=in_document,
    )

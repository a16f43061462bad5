"""How often each request's tokens have occurred: one int16 per slot and token, on the device.

The low 15 bits count outputs, up to 32767; the sign bit says that the prompt has the token. So a
value is 0 exactly if the token is new, and a row costs half of what its logits cost to read.

Shapes: S slots, V vocabulary, B requests, N ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels import sampling_inputs
from gpu_kernels.whole_numbers import next_power_of_2

COUNT_MASK = tl.constexpr(sampling_inputs.COUNT_MASK)
PROMPT_BIT = -0x8000


def fill_counts(counts_V: Tensor, prompt_ids_N: Tensor, output_ids_N: Tensor) -> None:
    """Set one slot's row to a request's prompt and the outputs that it has so far (int64 ids)."""
    times_V = torch.zeros(counts_V.shape, dtype=torch.int32, device=counts_V.device)
    times_V.index_add_(0, output_ids_N, torch.ones_like(output_ids_N, dtype=torch.int32))
    counts_V.copy_(times_V.clamp(max=COUNT_MASK.value))
    counts_V[prompt_ids_N] = counts_V[prompt_ids_N] | PROMPT_BIT


def count_tokens(counts_SV: Tensor, slot_B: Tensor, token_B: Tensor) -> None:
    """Count ``token_B[b]`` (int32 or int64) as an output in row ``slot_B[b]`` (int32).

    Slots differ. Where the slot or the token is -1 nothing is counted.
    """
    batch = slot_B.shape[0]
    assert counts_SV.dtype == torch.int16 and counts_SV.stride(1) == 1
    assert slot_B.shape == token_B.shape == (batch,) and slot_B.dtype == torch.int32
    assert slot_B.is_contiguous() and token_B.is_contiguous()
    assert counts_SV.device == slot_B.device == token_B.device
    if batch > 0:
        block = next_power_of_2(batch)
        _count_kernel[(1,)](counts_SV, slot_B, token_B, counts_SV.stride(0), batch, BLOCK_B=block)


def count_tokens_reference(counts_SV: Tensor, slot_B: Tensor, token_B: Tensor) -> None:
    """The same in plain torch."""
    for slot, token in zip(slot_B.tolist(), token_B.tolist(), strict=True):
        if slot >= 0 and token >= 0 and counts_SV[slot, token] & COUNT_MASK.value < 0x7FFF:
            counts_SV[slot, token] += 1


@triton.jit
def _count_kernel(counts_ptr, slot_ptr, token_ptr, stride_slot, batch, BLOCK_B: tl.constexpr):
    b_B = tl.arange(0, BLOCK_B)
    slot_B = tl.load(slot_ptr + b_B, mask=b_B < batch, other=-1).to(tl.int64)
    token_B = tl.load(token_ptr + b_B, mask=b_B < batch, other=-1).to(tl.int64)
    mask_B = (slot_B >= 0) & (token_B >= 0)
    entry_B = counts_ptr + slot_B * stride_slot + token_B
    count_B = tl.load(entry_B, mask=mask_B, other=0)
    is_full_B = (count_B & COUNT_MASK) == COUNT_MASK
    tl.store(entry_B, count_B + 1, mask=mask_B & (is_full_B == 0))

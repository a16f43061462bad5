"""One token per request from its logits, by the request's own settings, without the host.

Order: logit bias, penalties, temperature, top_k, top_p, min_p, draw. Two launches: one pass over
the vocabulary in tiles, then one program per request that joins the tiles. All in float32.

Shapes: B requests, V vocabulary, T tiles, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.checks import check_range
from gpu_kernels.device import family
from gpu_kernels.order_key import LOWEST, packed_index, packed_value
from gpu_kernels.paged_tile import FLOAT_DTYPES
from gpu_kernels.sampling_filter import draw_filtered
from gpu_kernels.sampling_inputs import (
    GROUP,
    TILE,
    LogitBias,
    Penalties,
    SamplingScratch,
    SamplingSettings,
)
from gpu_kernels.sampling_reference import sample_reference
from gpu_kernels.sampling_tile import GREEDY_BELOW, draw_tile_kernel, filters_tokens
from gpu_kernels.tuned import choose
from gpu_kernels.whole_numbers import next_power_of_2

__all__ = [
    "LogitBias",
    "Penalties",
    "SamplingScratch",
    "SamplingSettings",
    "sample",
    "sample_reference",
]

LIST_BLOCK = 4096  # listed tokens at a time: those of 32 groups


def sample(
    logits_BV: Tensor,
    settings: SamplingSettings,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
    scratch: SamplingScratch | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return a token per request, ``[B]`` int64 (or int32, as ``out``).

    A row with NaN or +inf among its logits, or nothing finite after bias and penalties, gets -1.
    Equal logits rank by id, the lower one first. A draw depends on the row's logits, its settings,
    seed and position, and on nothing else of the batch. ``logits_BV`` is not changed.
    """
    batch, vocab = logits_BV.shape
    device = logits_BV.device
    out = torch.empty(batch, dtype=torch.int64, device=device) if out is None else out
    assert logits_BV.dtype in FLOAT_DTYPES and logits_BV.stride(1) == 1 and vocab > 0
    assert out.shape == (batch,) and out.dtype in (torch.int32, torch.int64)
    assert out.is_contiguous() and out.device == device == settings.seed_B.device
    assert settings.temperature_B.shape == (batch,)
    if penalties is not None:
        assert penalties.slot_B.shape == (batch,) and penalties.counts_SV.shape[1] == vocab
        check_range("penalties.slot_B", penalties.slot_B, -1, penalties.counts_SV.shape[0])
    if bias is not None:
        assert bias.ids_BN.shape[0] == batch
    if batch == 0:
        return out
    scratch = SamplingScratch.for_batch(batch, vocab, device) if scratch is None else scratch
    scratch.check(batch, vocab, device)
    _launch_tiles(logits_BV, settings, penalties, bias, scratch)
    _launch_finish(settings, scratch, out, vocab)
    return out


def _launch_tiles(
    logits_BV: Tensor,
    settings: SamplingSettings,
    penalties: Penalties | None,
    bias: LogitBias | None,
    scratch: SamplingScratch,
) -> None:
    batch, vocab = logits_BV.shape
    draw_tile_kernel[(scratch.winner_BT.shape[1], batch)](
        logits_BV,
        settings.temperature_B,
        settings.top_k_B,
        settings.top_p_B,
        settings.min_p_B,
        settings.seed_B,
        settings.position_B,
        *_penalty_arguments(penalties),
        None if bias is None else bias.ids_BN,
        None if bias is None else bias.values_BN,
        scratch.scaled_BP,
        scratch.winner_BT,
        scratch.tile_max_BT,
        scratch.tile_sum_BT,
        scratch.group_max_BG,
        logits_BV.stride(0),
        0 if penalties is None else penalties.counts_SV.stride(0),
        vocab,
        HAS_PENALTIES=penalties is not None,
        MAX_BIAS=0 if bias is None else bias.ids_BN.shape[1],
        TILE=TILE,
        GROUP=GROUP,
        **choose("sampling_tile", family(logits_BV.device), rows=batch),
    )


def _penalty_arguments(penalties: Penalties | None) -> tuple[Tensor | None, ...]:
    if penalties is None:
        return (None,) * 5
    return (
        penalties.repetition_B,
        penalties.presence_B,
        penalties.frequency_B,
        penalties.slot_B,
        penalties.counts_SV,
    )


def _launch_finish(
    settings: SamplingSettings, scratch: SamplingScratch, out: Tensor, vocab: int
) -> None:
    batch, tiles, groups = out.shape[0], scratch.winner_BT.shape[1], scratch.group_max_BG.shape[1]
    _finish_kernel[(batch,)](
        settings.temperature_B,
        settings.top_k_B,
        settings.top_p_B,
        settings.min_p_B,
        settings.seed_B,
        settings.position_B,
        scratch.scaled_BP,
        scratch.winner_BT,
        scratch.tile_max_BT,
        scratch.tile_sum_BT,
        scratch.group_max_BG,
        scratch.listed_BG,
        out,
        vocab,
        NUM_TILES=tiles,
        NUM_GROUPS=groups,
        BLOCK_T=next_power_of_2(tiles),
        BLOCK_G=next_power_of_2(groups),
        GROUP=GROUP,
        LIST_BLOCK=LIST_BLOCK,
        **choose("sampling_finish", family(out.device), rows=batch),
    )


@triton.jit
def _finish_kernel(
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    position_ptr,
    scaled_ptr,
    winner_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    group_max_ptr,
    listed_ptr,
    out_ptr,
    vocab,
    NUM_TILES: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t_T = tl.arange(0, BLOCK_T)
    tile_T = row * NUM_TILES + t_T
    is_tile_T = t_T < NUM_TILES
    winner = tl.max(tl.load(winner_ptr + tile_T, mask=is_tile_T, other=LOWEST), 0)
    is_good = packed_value(winner) > float("-inf")  # a bad row's winner is NaN
    token = tl.where(is_good, packed_index(winner), -1)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    is_drawn = tl.load(temperature_ptr + row) >= GREEDY_BELOW
    if is_good & is_drawn & filters_tokens(top_k, top_p, min_p, vocab):
        g_G = tl.arange(0, BLOCK_G)
        group_ptr_G = group_max_ptr + row * NUM_GROUPS + g_G
        token = draw_filtered(
            token,
            top_k,
            top_p,
            min_p,
            tl.load(seed_ptr + row),
            tl.load(position_ptr + row),
            scaled_ptr + row * NUM_GROUPS * GROUP,
            tl.load(tile_max_ptr + tile_T, mask=is_tile_T, other=float("-inf")),
            tl.load(tile_sum_ptr + tile_T, mask=is_tile_T, other=0.0),
            tl.load(group_ptr_G, mask=g_G < NUM_GROUPS, other=float("-inf")),
            listed_ptr + row * NUM_GROUPS,
            vocab,
            GROUP,
            LIST_BLOCK,
        )
    tl.store(out_ptr + row, token.to(out_ptr.dtype.element_ty))

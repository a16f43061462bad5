"""Sampling in plain torch, row by row, by sorting: what the kernels must agree with.

Shapes: B requests, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_kernels.sampling_inputs import LogitBias, Penalties, SamplingSettings
from gpu_kernels.sampling_noise import gumbel_noise_reference
from gpu_kernels.sampling_tile import GREEDY_BELOW
from gpu_kernels.token_counts import COUNT_MASK


def sample_reference(
    logits_BV: Tensor,
    settings: SamplingSettings,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
) -> Tensor:
    """Return the token of each row, ``[B]`` int64; -1 where the row is bad."""
    tokens = []
    for row in range(logits_BV.shape[0]):
        x_V = adjusted_reference(logits_BV, row, penalties, bias)
        raw_V = logits_BV[row].float()
        if raw_V.isnan().any() or (raw_V == torch.inf).any() or not x_V.isfinite().any():
            tokens.append(-1)
            continue
        if settings.temperature_B[row] >= GREEDY_BELOW.value:
            kept_V = kept_reference(x_V, settings, row)
            seed, position = int(settings.seed_B[row]), int(settings.position_B[row])
            noise_V = gumbel_noise_reference(seed, position, len(x_V)).to(x_V.device)
            x_V = torch.where(kept_V, x_V / settings.temperature_B[row] + noise_V, -torch.inf)
        tokens.append(int(x_V.argmax()))
    return torch.tensor(tokens, dtype=torch.int64, device=logits_BV.device)


def adjusted_reference(
    logits_BV: Tensor, row: int, penalties: Penalties | None, bias: LogitBias | None
) -> Tensor:
    """One row's logits after bias and penalties, float32."""
    x_V = logits_BV[row].float().clone()
    if bias is not None:
        for token, value in zip(bias.ids_BN[row].tolist(), bias.values_BN[row], strict=True):
            if token < 0:
                break
            if token < len(x_V):
                x_V[token] += value
    if penalties is not None and penalties.slot_B[row] >= 0:
        count_V = penalties.counts_SV[penalties.slot_B[row]]
        repetition = penalties.repetition_B[row]
        by_sign_V = torch.where(x_V > 0, x_V / repetition, x_V * repetition)
        x_V = torch.where(count_V != 0, by_sign_V, x_V)
        times_V = (count_V & COUNT_MASK.value).float()
        drop_V = penalties.presence_B[row] + penalties.frequency_B[row] * times_V
        x_V = torch.where(times_V > 0, x_V - drop_V, x_V)
    return x_V


def kept_reference(x_V: Tensor, settings: SamplingSettings, row: int) -> Tensor:
    """Which tokens temperature, top_k, top_p and min_p leave of one row's adjusted logits."""
    z_V, ids_V = (x_V / settings.temperature_B[row]).sort(descending=True, stable=True)
    top_k, top_p = int(settings.top_k_B[row]), settings.top_p_B[row]
    num_kept = top_k if 0 < top_k < len(z_V) else len(z_V)
    probs_V = z_V[:num_kept].softmax(0)
    if top_p < 1:
        before_V = probs_V.double().cumsum(0) - probs_V.double()
        num_kept = max(int((before_V < top_p).sum()), 1)
    is_likely_V = probs_V[:num_kept] >= settings.min_p_B[row] * probs_V[0]
    kept_V = torch.zeros_like(x_V, dtype=torch.bool)
    kept_V[ids_V[:num_kept][is_likely_V]] = True
    return kept_V & (x_V > -torch.inf)

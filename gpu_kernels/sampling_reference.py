"""Sampling in plain torch, by sorting: what the kernels must agree with, and the CPU's sampler.

Nothing here needs Triton. A draw from 151,936 logits takes a core about 10 ms.

Shapes: B requests, D those that draw, V vocabulary, N tokens that can be kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_kernels.sampling_inputs import (
    COUNT_MASK,
    GREEDY_BELOW,
    LogitBias,
    Penalties,
    SamplingSettings,
)
from gpu_kernels.sampling_noise_reference import gumbel_noise_rows

NOISE_AT_ONCE = 2**18  # numbers
SLACK = 1e-3  # of a bound on logits: more than a logarithm's rounding


def sample_reference(
    logits_BV: Tensor,
    settings: SamplingSettings,
    *,
    penalties: Penalties | None = None,
    bias: LogitBias | None = None,
) -> Tensor:
    """Return the token of each row, ``[B]`` int64; -1 where the row is bad."""
    batch, vocab = logits_BV.shape
    x_BV = logits_BV.float()
    if penalties is not None or bias is not None:
        rows = [adjusted_reference(logits_BV, row, penalties, bias) for row in range(batch)]
        x_BV = torch.stack(rows)
    is_bad_B = ~logits_BV.float().amax(1).isfinite() | (x_BV.amax(1) == -torch.inf)
    drawn_D = torch.nonzero(settings.temperature_B >= GREEDY_BELOW).flatten()
    tokens_B = x_BV.argmax(1)
    for some_D in drawn_D.split(max(1, NOISE_AT_ONCE // vocab)) if len(drawn_D) else ():
        noise_DV = gumbel_noise_rows(settings.seed_B[some_D], settings.position_B[some_D], vocab)
        z_DV = x_BV[some_D] / settings.temperature_B[some_D, None]
        for z_V, row in zip(z_DV, some_D.tolist(), strict=True):
            if _filters(settings, row, vocab) and not is_bad_B[row]:
                z_V[~kept_reference(x_BV[row], settings, row)] = -torch.inf
        tokens_B[some_D] = (z_DV + noise_DV).argmax(1)
    return torch.where(is_bad_B, -1, tokens_B)


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
        times_V = (count_V & COUNT_MASK).float()
        drop_V = penalties.presence_B[row] + penalties.frequency_B[row] * times_V
        x_V = torch.where(times_V > 0, x_V - drop_V, x_V)
    return x_V


def kept_reference(x_V: Tensor, settings: SamplingSettings, row: int) -> Tensor:
    """Which tokens temperature, top_k, top_p and min_p leave of one row's adjusted logits."""
    z_V = x_V / settings.temperature_B[row]
    top_k, top_p = int(settings.top_k_B[row]), float(settings.top_p_B[row])
    min_p = float(settings.min_p_B[row])
    is_cut = 0 < top_k < len(z_V)
    least = _least_logit(z_V, top_k if is_cut else 0, top_p, min_p)
    ids_N = torch.nonzero((z_V >= least) & (z_V > -torch.inf)).flatten()
    z_N, order_N = z_V[ids_N].sort(descending=True, stable=True)
    ids_N = ids_N[order_N]
    if is_cut:
        z_N, ids_N = z_N[:top_k], ids_N[:top_k]
    mass_N = (z_N - z_N[0]).exp()
    if top_p < 1:
        mass = ((z_N if is_cut else z_V) - z_N[0]).exp().double().sum()
        before_N = mass_N.double().cumsum(0) - mass_N.double()
        mass_N = mass_N[: max(int((before_N < top_p * mass).sum()), 1)]
    kept_V = torch.zeros_like(x_V, dtype=torch.bool)
    kept_V[ids_N[: len(mass_N)][mass_N >= min_p]] = True
    return kept_V


def _least_logit(z_V: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """A bound below which no token is kept, so that few have to be sorted."""
    if top_k > 0:
        return z_V.topk(top_k).values[-1]
    if top_p < 1:
        # V tokens with less than (1 - top_p) / 2V each have less than what top_p leaves out
        return z_V.logsumexp(0) + math.log((1 - top_p) / 2 / len(z_V))
    return z_V.amax() + (math.log(min_p) - SLACK if min_p > 0 else -math.inf)


def _filters(settings: SamplingSettings, row: int, vocab: int) -> bool:
    is_cut = 0 < int(settings.top_k_B[row]) < vocab
    return is_cut or float(settings.top_p_B[row]) < 1 or float(settings.min_p_B[row]) > 0

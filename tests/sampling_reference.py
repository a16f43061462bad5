"""The documented sampling order, restated in float64 numpy one token at a time.

logit_bias -> repetition penalty -> presence and frequency penalties -> min_tokens
-> temperature -> top_k -> top_p -> min_p
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fiddler.sampling_params import SamplingParams

FILTERS = ("temperature", "top_k", "top_p", "min_p")


def adjusted(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    prompt: Sequence[int] = (),
    outputs: Sequence[int] = (),
    eos_ids: Sequence[int] = (),
) -> np.ndarray:
    """Logits after all that happens before the temperature."""
    scores = np.array(logits, dtype=np.float64)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *outputs}:
        penalty = params.repetition_penalty or 1.0
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(outputs):
        scores[token] -= params.presence_penalty
        scores[token] -= params.frequency_penalty * list(outputs).count(token)
    if len(outputs) < params.min_tokens:
        scores[[*eos_ids, *params.stop_token_ids]] = -np.inf
    return scores


def distribution(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    order: Sequence[str] = FILTERS,
    **texts: Any,
) -> np.ndarray:
    """The probability of each token; ``order`` other than the documented one shows its effect."""
    scores = adjusted(logits, params, **texts)
    for name in order:
        scores = _STEPS[name](scores, params)
    return softmax(scores)


def margin(logits: Sequence[float], params: SamplingParams, **texts: Any) -> float:
    """How far, as a probability, the nearest token is from being kept instead of dropped."""
    scores = adjusted(logits, params, **texts)
    scores = _top_k(_temperature(scores, params), params)
    ranked = np.sort(softmax(scores))[::-1]
    from_top_p = np.abs(np.cumsum(ranked)[:-1] - (params.top_p or 1.0))
    kept = softmax(_top_p(scores, params))
    from_min_p = np.abs(kept[kept > 0] - params.min_p * kept.max())
    far = [1.0]
    if (params.top_p or 1.0) < 1.0:
        far += list(from_top_p)
    return float(min([*far, *(from_min_p if params.min_p else [])]))


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def chi_square_excess(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations the chi-square statistic lies above its mean.

    Infinite if something was drawn that cannot be. Rare tokens (fewer than 5 expected) are pooled.
    """
    if (counts[probabilities == 0] > 0).any():
        return float("inf")
    expected = counts.sum() * probabilities
    is_rare = expected < 5
    pooled = np.append(expected[~is_rare], expected[is_rare].sum())
    found = np.append(counts[~is_rare], counts[is_rare].sum())
    found, pooled = found[pooled > 0], pooled[pooled > 0]
    freedom = max(len(pooled) - 1, 1)
    statistic = float(((found - pooled) ** 2 / pooled).sum())
    return (statistic - freedom) / float(np.sqrt(2 * freedom))


def _temperature(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    return scores / params.temperature


def _top_k(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    if params.top_k in (None, 0, -1):
        return scores
    likeliest = np.argsort(-scores, kind="stable")[: params.top_k]
    return _only(scores, likeliest)


def _top_p(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The fewest tokens whose probabilities reach top_p."""
    probabilities = softmax(scores)
    kept: list[int] = []
    for token in np.argsort(-scores, kind="stable"):
        if kept and probabilities[kept].sum() >= (params.top_p or 1.0):
            break
        kept.append(int(token))
    return _only(scores, kept)


def _min_p(scores: np.ndarray, params: SamplingParams) -> np.ndarray:
    probabilities = softmax(scores)
    return _only(scores, np.flatnonzero(probabilities >= params.min_p * probabilities.max()))


def _only(scores: np.ndarray, kept: Sequence[int] | np.ndarray) -> np.ndarray:
    filtered = np.full_like(scores, -np.inf)
    filtered[kept] = scores[kept]
    return filtered


_STEPS = {"temperature": _temperature, "top_k": _top_k, "top_p": _top_p, "min_p": _min_p}

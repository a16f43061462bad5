"""From logits to token ids, each request by its own settings.

Order: logit_bias and penalties -> min_tokens -> temperature -> top_k -> top_p -> min_p -> draw.
A draw needs one uniform number, taken from a generator seeded by (request seed, position), so a
request's tokens depend neither on its batch nor on being preempted.

Shapes: R rows (one per request), V vocabulary.
"""

import random
from collections import Counter
from collections.abc import Sequence

import torch

from fiddler.engine.request import Request
from fiddler.errors import NumericsError

NEG_INF = float("-inf")
GREEDY_BELOW = 1e-5  # a smaller temperature is as good as 0, and the division would overflow


def is_plain_greedy(request: Request) -> bool:
    """Whether the next token is that of the largest logit."""
    return (request.params.temperature or 0.0) < GREEDY_BELOW and not _adjusts(request)


def sample(
    logits_RV: torch.Tensor, requests: Sequence[Request], eos_ids: frozenset[int]
) -> list[int]:
    """Return one token id per request. ``logits_RV`` float32 is not changed.

    Raises NumericsError when a row holds NaN or nothing finite.
    """
    if not bool(torch.isfinite(logits_RV.amax(dim=-1)).all()):
        raise not_finite()
    adjusted_RV = torch.stack(
        [adjust(row_V, r, eos_ids) for row_V, r in zip(logits_RV, requests, strict=True)]
    )
    greedy_R = adjusted_RV.argmax(dim=-1).tolist()
    return [
        greedy if (request.params.temperature or 0.0) < GREEDY_BELOW else draw(row_V, request)
        for greedy, row_V, request in zip(greedy_R, adjusted_RV, requests, strict=True)
    ]


def adjust(row_V: torch.Tensor, request: Request, eos_ids: frozenset[int]) -> torch.Tensor:
    """Apply logit_bias, penalties and min_tokens; returns ``row_V`` itself when there are none."""
    if not _adjusts(request):
        return row_V
    p = request.params
    row_V = row_V.clone()
    if p.logit_bias:
        ids, bias = _tensors(p.logit_bias, row_V)
        row_V[ids] += bias
    if _is_penalised(request):
        _penalise(row_V, request)
    if _is_too_short(request):
        row_V[[i for i in eos_ids.union(p.stop_token_ids) if i < len(row_V)]] = NEG_INF
    return row_V


def not_finite() -> NumericsError:
    """The error for logits that hold NaN or nothing finite."""
    return NumericsError(
        "the model produced NaN or infinite logits",
        hint="the checkpoint is damaged, or its weights do not suit this dtype",
    )


def _adjusts(request: Request) -> bool:
    return bool(request.params.logit_bias) or _is_penalised(request) or _is_too_short(request)


def _is_penalised(request: Request) -> bool:
    p = request.params
    repeats = p.repetition_penalty not in (None, 1.0)
    return repeats or p.presence_penalty != 0 or p.frequency_penalty != 0


def _is_too_short(request: Request) -> bool:
    return request.num_outputs < request.params.min_tokens


def draw(row_V: torch.Tensor, request: Request) -> int:
    """Draw one token from the filtered distribution by inverting its cumulative sum."""
    p = request.params
    assert p.temperature
    probs_V, ids_V = _filtered(row_V / p.temperature, p.top_k or 0, p.top_p or 1.0, p.min_p)
    uniform = random.Random(f"{request.seed}/{request.index}/{len(request.tokens)}").random()
    cumulative_V = probs_V.double().cumsum(dim=-1)
    target = torch.tensor(uniform, dtype=torch.float64, device=row_V.device) * cumulative_V[-1]
    at = int(torch.searchsorted(cumulative_V, target, right=True).clamp(max=len(probs_V) - 1))
    return int(ids_V[at])


def _filtered(
    row_V: torch.Tensor, top_k: int, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities that are kept, largest first, and their token ids."""
    logits_V, ids_V = row_V.sort(descending=True, stable=True)
    if top_k > 0:
        logits_V, ids_V = logits_V[:top_k], ids_V[:top_k]
    probs_V = logits_V.softmax(dim=-1)
    if top_p < 1.0:  # the smallest set that reaches top_p: drop what begins at or beyond it
        kept = int((probs_V.cumsum(dim=-1) - probs_V < top_p).sum().clamp(min=1))
        probs_V, ids_V = probs_V[:kept], ids_V[:kept]
    if min_p > 0.0:
        kept = int((probs_V >= min_p * probs_V[0]).sum())
        probs_V, ids_V = probs_V[:kept], ids_V[:kept]
    return probs_V, ids_V


def _penalise(row_V: torch.Tensor, request: Request) -> None:
    p = request.params
    if p.repetition_penalty not in (None, 1.0):
        seen = torch.tensor(sorted(set(request.tokens)), device=row_V.device)
        values = row_V[seen]
        row_V[seen] = torch.where(
            values > 0, values / p.repetition_penalty, values * p.repetition_penalty
        )
    counts = Counter(request.output_ids)
    if counts and (p.presence_penalty or p.frequency_penalty):
        ids, times = _tensors({t: float(n) for t, n in counts.items()}, row_V)
        row_V[ids] -= p.presence_penalty + p.frequency_penalty * times


def _tensors(values: dict[int, float], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor(list(values), device=like.device),
        torch.tensor(list(values.values()), dtype=like.dtype, device=like.device),
    )

"""From logits to token ids, each request by its own settings.

Order: logit_bias and penalties -> min_tokens -> temperature -> top_k -> top_p -> min_p -> draw.
The device draws as :mod:`gpu_kernels.sampling` says, by (seed, position), so a request's tokens
depend neither on its batch nor on being preempted, nor on who draws: the kernel in a decode step,
the kernel behind a prompt, or plain torch where there is no GPU.

Shapes: R rows (one per request), V vocabulary.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from fiddler.engine.draw_settings import next_draws
from fiddler.engine.request import Request
from fiddler.errors import NumericsError
from gpu_kernels.sampling_reference import sample_reference

NEG_INF = float("-inf")


def sample(
    logits_RV: torch.Tensor,
    requests: Sequence[Request],
    eos_ids: frozenset[int],
    drawn_ids: Sequence[int] | None = None,
) -> list[int]:
    """Return one token id per request. ``logits_RV`` float32 is not changed.

    ``drawn_ids``: what a decode step has drawn from ``logits_RV`` as they are; it holds for the
    requests that adjust nothing. Raises NumericsError when a row holds NaN or nothing finite.
    """
    tokens = [-1] * len(requests) if drawn_ids is None else list(drawn_ids)
    rows = [r for r, request in enumerate(requests) if drawn_ids is None or adjusts(request)]
    if rows:
        some_RV = logits_RV if len(rows) == len(requests) else logits_RV[rows]
        some = [requests[row] for row in rows]
        for row, token in zip(rows, _draw(some_RV, some, eos_ids), strict=True):
            tokens[row] = token
    if min(tokens) < 0:
        raise NumericsError(
            "the model produced NaN or infinite logits",
            hint="the checkpoint is damaged, or its weights do not suit this dtype",
        )
    return tokens


def adjusts(request: Request) -> bool:
    """Whether its logits are changed before its next token is drawn."""
    return bool(request.params.logit_bias) or _is_penalised(request) or _is_too_short(request)


def adjust(row_V: torch.Tensor, request: Request, eos_ids: frozenset[int]) -> torch.Tensor:
    """Apply logit_bias, penalties and min_tokens; returns ``row_V`` itself when there are none."""
    if not adjusts(request):
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


def _draw(
    logits_RV: torch.Tensor, requests: Sequence[Request], eos_ids: frozenset[int]
) -> list[int]:
    if any(map(adjusts, requests)):
        rows = zip(logits_RV, requests, strict=True)
        logits_RV = torch.stack([adjust(row_V, request, eos_ids) for row_V, request in rows])
    settings = next_draws(requests, logits_RV.device)
    if logits_RV.device.type == "cpu":
        return sample_reference(logits_RV, settings).tolist()
    from gpu_kernels.sampling import sample as sample_by_kernel  # triton wants a GPU

    return sample_by_kernel(logits_RV, settings).tolist()


def _is_penalised(request: Request) -> bool:
    p = request.params
    repeats = p.repetition_penalty not in (None, 1.0)
    return repeats or p.presence_penalty != 0 or p.frequency_penalty != 0


def _is_too_short(request: Request) -> bool:
    return request.num_outputs < request.params.min_tokens


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

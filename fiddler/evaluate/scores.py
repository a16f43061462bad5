"""What predictions are worth, in nats and float64: pure.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Iterator

import torch

# Rows widened to float64 at a time. The engine makes 64 and leaves room for little more.
BLOCK_ROWS = 8


def surprise(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """Float64 ``[R]``: minus each target's log-probability; NaN for a row of no finite sum."""
    parts = [
        -_logprobs(logits_RV[rows]).gather(1, targets_R[rows, None])[:, 0]
        for rows in _blocks(len(logits_RV))
    ]
    return torch.cat(parts)


def divergence(
    logits_RV: torch.Tensor, reference_RV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 ``[R]``, the Kullback-Leibler divergence of the model from the reference, and bool
    ``[R]``, whether some token is the likeliest of both.

    The divergence is ``sum p_ref (log p_ref - log p)``. Equal largest logits are all the likeliest:
    rounded to bfloat16, they often are equal.
    """
    parts = [_divergence(logits_RV[rows], reference_RV[rows]) for rows in _blocks(len(logits_RV))]
    return torch.cat([kl for kl, _ in parts]), torch.cat([same for _, same in parts])


def _divergence(
    logits_RV: torch.Tensor, reference_RV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted_RV = _logprobs(reference_RV)
    kl_R = (wanted_RV.exp() * (wanted_RV - _logprobs(logits_RV))).sum(dim=-1)
    return kl_R, (_is_top(logits_RV) & _is_top(reference_RV)).any(dim=-1)


def _is_top(logits_RV: torch.Tensor) -> torch.Tensor:
    return logits_RV == logits_RV.amax(dim=-1, keepdim=True)


def _logprobs(logits_RV: torch.Tensor) -> torch.Tensor:
    return logits_RV.double().log_softmax(dim=-1)


def _blocks(num_rows: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, num_rows, BLOCK_ROWS))

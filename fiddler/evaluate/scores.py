"""What predictions are worth, in nats and float64: pure.

Shapes: R rows, V vocabulary.
"""

import torch

BLOCK_ROWS = (
    8  # widened to float64 at a time: of the 64 that the engine makes, to take little memory
)


def surprise(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
    """Float64 ``[R]``: minus the log-probability of each target. NaN where a row has no finite
    normaliser."""
    parts = [
        -_logprobs(rows_RV).gather(1, targets[:, None])[:, 0]
        for rows_RV, targets in zip(
            logits_RV.split(BLOCK_ROWS), targets_R.split(BLOCK_ROWS), strict=True
        )
    ]
    return torch.cat(parts)


def divergence(
    logits_RV: torch.Tensor, reference_RV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 ``[R]``: Kullback-Leibler divergence of the model's distribution from the reference's,
    ``sum p_ref (log p_ref - log p)``; and bool ``[R]``: whether both have the same likeliest token.

    Of several tokens that the model thinks equally likely, any is its likeliest.
    """
    parts = [
        _divergence(rows_RV, wanted_RV)
        for rows_RV, wanted_RV in zip(
            logits_RV.split(BLOCK_ROWS), reference_RV.split(BLOCK_ROWS), strict=True
        )
    ]
    return torch.cat([kl for kl, _ in parts]), torch.cat([same for _, same in parts])


def _divergence(
    logits_RV: torch.Tensor, reference_RV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    wanted_RV = _logprobs(reference_RV)
    kl_R = (wanted_RV.exp() * (wanted_RV - _logprobs(logits_RV))).sum(dim=-1)
    top_R1 = reference_RV.argmax(dim=-1, keepdim=True)
    return kl_R, logits_RV.gather(1, top_R1)[:, 0] == logits_RV.amax(dim=-1)


def _logprobs(logits_RV: torch.Tensor) -> torch.Tensor:
    return logits_RV.double().log_softmax(dim=-1)

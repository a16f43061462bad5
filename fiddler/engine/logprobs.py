"""Log-probabilities under the model's own distribution, before any setting changes it.

Shapes: R rows, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from fiddler.outputs import Logprob

DecodeToken = Callable[[int], str]


def token_logprobs(
    logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int, decode: DecodeToken
) -> list[dict[int, Logprob]]:
    """Return per row the ``num_top`` likeliest tokens and the given one, with ranks from 1."""
    if not token_ids:
        return []
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    ids_R1 = torch.tensor(token_ids, device=logits_RV.device).unsqueeze(1)
    chosen_R1 = logprobs_RV.gather(1, ids_R1)
    ranks = ((logprobs_RV > chosen_R1).sum(dim=1) + 1).tolist()
    top_values, top_ids = logprobs_RV.topk(min(num_top, logprobs_RV.shape[1]), dim=-1)
    rows = []
    for r, token in enumerate(token_ids):
        row = {
            int(i): Logprob(float(v), rank, decode(int(i)))
            for rank, (i, v) in enumerate(zip(top_ids[r], top_values[r], strict=True), start=1)
        }
        row.setdefault(token, Logprob(float(chosen_R1[r, 0]), ranks[r], decode(token)))
        rows.append(row)
    return rows

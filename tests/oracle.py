"""What ``transformers`` says about a tiny model: logits, greedy tokens, the router's choices."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.tiny_models import load_oracle


@cache
def oracle(folder: Path) -> Any:
    """The float32 model of a folder, loaded once."""
    return load_oracle(folder)


@torch.inference_mode()
def oracle_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Float32 ``[len(ids), V]``."""
    logits: torch.Tensor = oracle(folder)(torch.tensor([ids])).logits[0].float()
    return logits


def oracle_logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """Float64 ``[len(ids), V]``; row t is about token t + 1."""
    return oracle_logits(folder, ids).double().log_softmax(dim=-1)


@torch.inference_mode()
def oracle_greedy(folder: Path, ids: list[int], num_tokens: int, **settings: Any) -> list[int]:
    """What ``generate`` appends, without a stop at the end token."""
    prompt = torch.tensor([ids])
    tokens = oracle(folder).generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    return [int(token) for token in tokens[0, len(ids) :]]


@torch.inference_mode()
def oracle_experts(folder: Path, ids: list[int], top_k: int) -> list[list[set[int]]]:
    """The chosen experts, ``[MoE layers][tokens]``."""
    found = oracle(folder)(torch.tensor([ids]), output_router_logits=True)
    return [
        [set(row) for row in scores.topk(top_k, dim=-1).indices.tolist()]
        for scores in found.router_logits
    ]

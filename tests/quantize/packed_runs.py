"""Runs of packed models on the CPU, and of the oracle on the same texts."""

from pathlib import Path
from typing import Any

import torch

from fiddler import LLM
from tests.forward import Forward, random_texts
from tests.model.test_parity import split_at_random
from tests.tiny_models import load_oracle

TEXTS, PROMPTS = random_texts([9, 41], 256), [5, 33]


def loaded(folder: Path, **options: Any) -> LLM:
    """In float32, with experts on both sides."""
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cpu_threads": 1}
    settings |= {"placement": split_at_random(folder, seed=1), "max_model_len": 128}
    return LLM(str(folder), **(settings | options))


def logits(folder: Path, **options: Any) -> list[torch.Tensor]:
    """Of two texts, read in part and then decoded side by side."""
    with loaded(folder, **options) as llm:
        return Forward(llm).logits(TEXTS, PROMPTS)


def oracle_logits(folder: Path) -> list[torch.Tensor]:
    """Of the same texts, where ``folder`` has plain weights."""
    oracle = load_oracle(folder)
    with torch.inference_mode():
        return [oracle(torch.tensor([text])).logits[0] for text in TEXTS]

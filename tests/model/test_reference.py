"""The plain reference against transformers, for all that an architecture can turn on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fiddler.models.checkpoint import Checkpoint
from fiddler.models.config import ModelConfig
from fiddler.models.reference import Reference, reference_greedy, reference_logits
from fiddler.models.registry import load_config
from fiddler.models.weights import CheckpointSource
from tests.tiny_models import EOS_ID, MODEL_TYPES, load_oracle, shared_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
YARN |= {"original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in MODEL_TYPES),
    ("mixtral", {"sliding_window": 5, "head_dim": 24}),
    ("mixtral", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("mixtral", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    ("olmoe", {"norm_topk_prob": True, "attention_bias": True, "clip_qkv": None}),
    ("olmoe", {"num_key_value_heads": 4}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": False, "mlp_only_layers": [0]}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 6, "rope_parameters": YARN}),
]
IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(1)).tolist()


def opened(folder: Path) -> tuple[CheckpointSource, ModelConfig]:
    return CheckpointSource(Checkpoint.open(folder)), load_config(folder)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.inference_mode()
def oracle_logits(folder: Path, ids: list[int], dtype: str = "float32") -> torch.Tensor:
    logits: torch.Tensor = load_oracle(folder, dtype)(torch.tensor([ids])).logits[0]
    return logits.float()


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_logits_equal_the_oracles(model_type: str, overrides: dict[str, Any]) -> None:
    folder = shared_tiny(model_type, **overrides)
    got_TV, want_TV = reference_logits(*opened(folder), IDS), oracle_logits(folder, IDS)
    assert got_TV.shape == want_TV.shape
    assert relative_error(got_TV, want_TV) < 1e-5
    assert (got_TV - want_TV).abs().max() < 1e-4 * want_TV.abs().max()


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_greedy_tokens_equal_the_oracles(model_type: str, overrides: dict[str, Any]) -> None:
    folder = shared_tiny(model_type, **overrides)
    want = load_oracle(folder).generate(
        torch.tensor([IDS[:40]]), max_new_tokens=32, do_sample=False, eos_token_id=EOS_ID
    )
    source, config = opened(folder)
    assert reference_greedy(source, config, IDS[:40], 32, (EOS_ID,)) == want[0, 40:].tolist()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pieces_give_the_logits_of_the_whole(model_type: str) -> None:
    source, config = opened(shared_tiny(model_type))
    model = Reference(source, config, torch.float32)
    pieces = [model.forward(IDS[a:b]) for a, b in ((0, 1), (1, 30), (30, 31), (31, 70))]
    assert relative_error(torch.cat(pieces), reference_logits(source, config, IDS)) < 1e-5


def test_an_end_id_ends_and_is_part_of_the_answer() -> None:
    source, config = opened(shared_tiny("mixtral"))
    free = reference_greedy(source, config, IDS, 12)
    assert len(free) == 12
    stop = free.index(free[5])
    assert reference_greedy(source, config, IDS, 12, (free[5],)) == free[: stop + 1]
    assert reference_greedy(source, config, IDS, 0) == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_is_as_near_to_f32_as_the_oracles(model_type: str) -> None:
    folder = shared_tiny(model_type, dtype="bfloat16")
    exact_TV = oracle_logits(folder, IDS)
    got_TV = reference_logits(*opened(folder), IDS, dtype=torch.bfloat16)
    theirs_TV = oracle_logits(folder, IDS, "bfloat16")
    assert relative_error(got_TV, exact_TV) <= 1.2 * relative_error(theirs_TV, exact_TV)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_stored_precision_is_widened_exactly(stored: str) -> None:
    folder = shared_tiny("qwen2_moe", dtype=stored)
    got_TV = reference_logits(*opened(folder), IDS)
    assert relative_error(got_TV, oracle_logits(folder, IDS)) < 1e-5

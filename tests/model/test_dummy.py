"""Seeded weights: the same everywhere, normal, and a model of them stays alive at any depth."""

import dataclasses
import itertools
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.seeded_table import LANES, LEVELS, fill_from_table
from fiddler.models.config import ModelConfig
from fiddler.models.dummy import DummySource
from fiddler.models.manifest import all_parts
from fiddler.models.reference import Reference, reference_logits
from fiddler.models.registry import parse_config

CONFIG = parse_config({"model_type": "qwen2_moe"})
NAME = "model.layers.3.mlp.experts.1.up_proj.weight"
BIG = (1000, 701)  # several blocks, the last one ragged


def filled(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    out = torch.full(shape, float("nan"), dtype=dtype)
    DummySource(CONFIG, seed).fill_(out, name)
    return out


def test_a_tensor_depends_on_seed_and_name_alone() -> None:
    first = filled(NAME, BIG, torch.float32)
    assert torch.equal(first, filled(NAME, BIG, torch.float32))
    assert torch.equal(first, DummySource(CONFIG, 0).tensor(NAME, BIG))
    for other in (filled(NAME, BIG, torch.float32, seed=1), filled(NAME + "x", BIG, torch.float32)):
        same = (first == other).float().mean()
        assert same < 3 / LEVELS  # chance: 1 / LEVELS
        assert abs(torch.corrcoef(torch.stack((first.view(-1), other.view(-1))))[0, 1]) < 0.01


def test_dtypes_are_roundings_of_the_same_numbers() -> None:
    wide = filled(NAME, BIG, torch.float32)
    assert torch.equal(filled(NAME, BIG, torch.bfloat16), wide.bfloat16())


def test_threads_fill_as_one_does() -> None:
    names = [f"model.layers.{i}.weight" for i in range(12)]
    alone = [filled(name, BIG, torch.bfloat16) for name in names]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda name: filled(name, BIG, torch.bfloat16), names))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@given(
    total=st.integers(1, 3000),
    cuts=st.lists(st.integers(0, 700), max_size=4),
    key=st.integers(0, 2**64 - 1),
)
def test_any_block_can_be_filled_alone(total: int, cuts: list[int], key: int) -> None:
    table = np.arange(LEVELS, dtype=np.uint16)
    whole = np.empty(total, np.uint16)
    fill_from_table(whole, table, np.uint64(key), 0)
    edges = sorted({0, total, *(LANES * cut for cut in cuts if LANES * cut < total)})
    for begin, end in itertools.pairwise(edges):
        block = np.empty(end - begin, np.uint16)
        fill_from_table(block, table, np.uint64(key), begin)
        assert np.array_equal(block, whole[begin:end])


def test_numbers_are_normal_and_independent() -> None:
    numbers = filled(NAME, (1024, 1024), torch.float32) * 32  # variance 1 / fan-in
    assert abs(numbers.mean()) < 5e-3
    assert numbers.std() == pytest.approx(1.0, abs=5e-3)
    normal = statistics.NormalDist()
    for level in (0.001, 0.05, 0.3, 0.5, 0.9, 0.999):
        share = (numbers <= normal.inv_cdf(level)).double().mean()
        assert share == pytest.approx(level, abs=2e-3)
    for lag in (1, 2, 3, 4, 1024):
        flat = numbers.view(-1)
        assert abs((flat[:-lag] * flat[lag:]).mean()) < 5e-3


def test_norms_are_near_one_and_biases_near_zero() -> None:
    norm = filled("model.layers.0.input_layernorm.weight", (4096,), torch.float32)
    bias = filled("model.layers.0.self_attn.q_proj.bias", (4096,), torch.float32)
    assert norm.mean() == pytest.approx(1.0, abs=0.01)
    assert bias.mean() == pytest.approx(0.0, abs=0.01)
    assert norm.std() == pytest.approx(0.1, rel=0.1) == bias.std()


def small(model_type: str, **fields: Any) -> ModelConfig:
    raw = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    raw |= {"head_dim": 16, "num_experts": 16, "num_experts_per_tok": 2, "intermediate_size": 32}
    raw |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return parse_config({"model_type": model_type, **raw, **fields})


TOKENS = torch.randint(0, 99, (64,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_sixty_layers_stay_finite_and_say_something(model_type: str) -> None:
    config = small(model_type, num_hidden_layers=60)
    logits_TV = reference_logits(DummySource(config, 3), config, TOKENS, dtype=torch.bfloat16)
    assert torch.isfinite(logits_TV).all()
    assert 0.5 < logits_TV.std() < 2.0
    assert len(logits_TV.argmax(-1).unique()) > 16  # the last layer still tells tokens apart


def test_a_tied_model_has_logits_of_the_same_size() -> None:
    config = dataclasses.replace(small("olmoe", num_hidden_layers=2), tie_embeddings=True)
    logits_TV = reference_logits(DummySource(config, 3), config, TOKENS)
    assert 0.5 < logits_TV.std() < 2.0


def test_routing_uses_all_experts_to_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("olmoe", num_hidden_layers=24)
    used: dict[int, set[int]] = {}
    plain_weight = Reference._weight

    def noting(self: Reference, name: str, layer: int = 0, expert: int = 0) -> torch.Tensor:
        if name == config.names.expert_gate:
            used.setdefault(layer, set()).add(expert)
        return plain_weight(self, name, layer, expert)

    monkeypatch.setattr(Reference, "_weight", noting)
    reference_logits(DummySource(config, 3), config, TOKENS)
    assert len(used) == 24
    assert min(len(experts) for experts in used.values()) >= 14  # of 16, by 128 choices


def test_every_tensor_of_a_model_can_be_made() -> None:
    config = small("qwen2_moe", num_hidden_layers=2, mlp_only_layers=[1])
    source = DummySource(config, 0)
    kinds = {re.sub(r"\d+", "N", part.name): part for part in all_parts(config)}
    for part in kinds.values():
        tensor = source.tensor(part.name, part.shape)
        assert tensor.shape == part.shape
        assert torch.isfinite(tensor).all()

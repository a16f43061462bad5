"""Inverse frequencies and tables against transformers' own functions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.errors import ConfigError
from fiddler.models.registry import parse_config
from fiddler.models.rope import inverse_frequencies, rope_tables

MAX_POSITION = 4096


def fields_of(rope: dict[str, Any], head_dim: int, theta: float) -> dict[str, Any]:
    return {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 4 * head_dim,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITION,
        "rope_parameters": {"rope_theta": theta, **rope},
    }


def oracle(fields: dict[str, Any]) -> tuple[Any, torch.Tensor, float]:
    """Return transformers' rotary module with its inverse frequencies and attention factor."""
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    module = MixtralRotaryEmbedding(MixtralConfig(**fields))
    return module, module.inv_freq, module.attention_scaling


FACTORS = st.floats(1.0, 40.0)
YARN = st.fixed_dictionaries(
    {"rope_type": st.just("yarn"), "factor": FACTORS},
    optional={
        "original_max_position_embeddings": st.sampled_from([512, 1024, 2048]),
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "attention_factor": st.floats(0.5, 2.0),
        "mscale": st.floats(0.5, 1.5),
        "mscale_all_dim": st.floats(0.5, 1.5),
        "truncate": st.booleans(),
    },
)
LLAMA3 = st.fixed_dictionaries(
    {
        "rope_type": st.just("llama3"),
        "factor": FACTORS,
        "low_freq_factor": st.floats(0.5, 1.5),
        "high_freq_factor": st.floats(2.0, 8.0),
    },
    optional={"original_max_position_embeddings": st.sampled_from([512, 1024, 2048])},
)
SIMPLE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic"]), "factor": FACTORS}
)


@given(
    rope=st.one_of(SIMPLE, YARN, LLAMA3),
    head_dim=st.sampled_from([8, 24, 64, 128]),
    theta=st.floats(1e3, 1e7),
)
@settings(max_examples=200)
def test_frequencies_equal_the_oracles(rope: dict[str, Any], head_dim: int, theta: float) -> None:
    fields = fields_of(rope, head_dim, theta)
    _, want, want_factor = oracle(fields)
    got, factor = inverse_frequencies(parse_config({"model_type": "mixtral", **fields}))
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-12)
    assert factor == pytest.approx(want_factor, rel=1e-6)


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_tables_equal_the_oracles(kind: str) -> None:
    fields = fields_of({"rope_type": kind, "factor": 4.0}, 24, 1e4)
    module, *_ = oracle(fields)
    want_cos, want_sin = module(torch.zeros(1), torch.arange(100)[None])
    cos_SR, sin_SR = rope_tables(parse_config({"model_type": "mixtral", **fields}), 100)
    assert cos_SR.dtype == sin_SR.dtype == torch.float32
    torch.testing.assert_close(cos_SR, want_cos[0, :, :12], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin_SR, want_sin[0, :, :12], rtol=1e-5, atol=1e-5)


def test_dynamic_is_refused_where_it_would_change_with_the_length() -> None:
    fields = fields_of({"rope_type": "dynamic", "factor": 2.0}, 8, 1e4)
    config = parse_config({"model_type": "mixtral", **fields})
    assert len(rope_tables(config, MAX_POSITION)[0]) == MAX_POSITION
    with pytest.raises(ConfigError, match=str(MAX_POSITION)):
        rope_tables(config, MAX_POSITION + 1)

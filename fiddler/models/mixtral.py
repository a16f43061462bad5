"""Mixtral: top-2 of 8 experts, renormalised; weights named w1 (gate), w3 (up), w2 (down)."""

from fiddler.models.config import ModelConfig, WeightNames
from fiddler.models.fields import RawConfig, common, integer

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "rope_theta": 1e6,
}

NAMES = WeightNames(
    router="model.layers.{l}.block_sparse_moe.gate.weight",
    expert_gate="model.layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
    expert_up="model.layers.{l}.block_sparse_moe.experts.{e}.w3.weight",
    expert_down="model.layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
)


def config(raw: RawConfig) -> ModelConfig:
    """Return the record of a Mixtral ``config.json``."""
    raw = {**DEFAULTS, **raw}
    window = None if raw.get("sliding_window") is None else integer(raw, "sliding_window")
    layers = range(integer(raw, "num_hidden_layers"))
    return ModelConfig(
        model_type="mixtral",
        names=NAMES,
        expert_size=integer(raw, "intermediate_size"),
        sliding_window=window,
        window_layers=frozenset(layers if window else ()),
        **common(raw),
    )

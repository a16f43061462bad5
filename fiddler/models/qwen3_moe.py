"""Qwen3-MoE: 128 small experts, no shared one, RMSNorm on each head of queries and keys."""

from fiddler.models.config import ModelConfig, QKNorm, WeightNames
from fiddler.models.fields import RawConfig, boolean, common, integer, sparse_step_dense_layers

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
    "rope_theta": 1e4,
}

NAMES = WeightNames(
    q_norm="model.layers.{l}.self_attn.q_norm.weight",
    k_norm="model.layers.{l}.self_attn.k_norm.weight",
)


def config(raw: RawConfig) -> ModelConfig:
    """Return the record of a Qwen3-MoE ``config.json``."""
    raw = {**DEFAULTS, **raw}
    windowed = boolean(raw, "use_sliding_window") and raw["sliding_window"] is not None
    bias = boolean(raw, "attention_bias")
    layers = range(integer(raw, "num_hidden_layers"))
    return ModelConfig(
        model_type="qwen3_moe",
        names=NAMES,
        expert_size=integer(raw, "moe_intermediate_size"),
        dense_size=integer(raw, "intermediate_size"),
        dense_layers=sparse_step_dense_layers(raw),
        norm_topk=boolean(raw, "norm_topk_prob"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm.PER_HEAD,
        sliding_window=integer(raw, "sliding_window") if windowed else None,
        window_layers=frozenset(layers if windowed else ()),
        **common(raw),
    )

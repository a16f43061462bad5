"""OLMoE: 64 experts, RMSNorm over all heads of queries and keys at once, optional clipping."""

from fiddler.models.config import ModelConfig, QKNorm, WeightNames
from fiddler.models.fields import RawConfig, boolean, common, integer, number, refuse_window

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "rope_theta": 1e4,
}

NAMES = WeightNames(
    q_norm="model.layers.{l}.self_attn.q_norm.weight",
    k_norm="model.layers.{l}.self_attn.k_norm.weight",
)


def config(raw: RawConfig) -> ModelConfig:
    """Return the record of an OLMoE ``config.json``."""
    raw = {**DEFAULTS, **raw}
    refuse_window(raw)
    bias = boolean(raw, "attention_bias")
    return ModelConfig(
        model_type="olmoe",
        names=NAMES,
        expert_size=integer(raw, "intermediate_size"),
        norm_topk=boolean(raw, "norm_topk_prob"),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm.FULL,
        clip_qkv=None if raw.get("clip_qkv") is None else number(raw, "clip_qkv"),
        **common(raw),
    )

"""Qwen2-MoE: many small experts, beside them one shared expert behind a sigmoid gate."""

from fiddler.models.config import ModelConfig, WeightNames
from fiddler.models.fields import (
    RawConfig,
    bad_value,
    boolean,
    common,
    integer,
    sparse_step_dense_layers,
    unsupported,
)

DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "qkv_bias": True,
    "rope_theta": 1e4,
}

_SHARED = "model.layers.{l}.mlp.shared_expert"
NAMES = WeightNames(
    shared_gate=f"{_SHARED}.gate_proj.weight",
    shared_up=f"{_SHARED}.up_proj.weight",
    shared_down=f"{_SHARED}.down_proj.weight",
    shared_router=f"{_SHARED}_gate.weight",
)


def config(raw: RawConfig) -> ModelConfig:
    """Return the record of a Qwen2-MoE ``config.json``."""
    raw = {**DEFAULTS, **raw}
    window_layers = _window_layers(raw)
    return ModelConfig(
        model_type="qwen2_moe",
        names=NAMES,
        expert_size=integer(raw, "moe_intermediate_size"),
        dense_size=integer(raw, "intermediate_size"),
        dense_layers=sparse_step_dense_layers(raw),
        shared_size=integer(raw, "shared_expert_intermediate_size"),
        norm_topk=boolean(raw, "norm_topk_prob"),
        qkv_bias=boolean(raw, "qkv_bias"),
        sliding_window=integer(raw, "sliding_window") if window_layers else None,
        window_layers=window_layers,
        **common(raw),
    )


def _window_layers(raw: RawConfig) -> frozenset[int]:
    """Return the layers with a window: those listed, or every other one below the limit."""
    num_layers, used = integer(raw, "num_hidden_layers"), boolean(raw, "use_sliding_window")
    listed = raw.get("layer_types")
    if listed is None:
        limit = integer(raw, "max_window_layers", minimum=0)
        return frozenset(i for i in range(num_layers) if used and i % 2 == 0 and i < limit)
    if not isinstance(listed, list) or len(listed) != num_layers:
        raise bad_value("layer_types", listed, f"a list of {num_layers} names")
    for kind in listed:
        if kind not in ("full_attention", "sliding_attention"):
            raise unsupported("layer_types", kind, "it knows full and sliding attention")
    windowed = frozenset(i for i, kind in enumerate(listed) if kind == "sliding_attention")
    if windowed and not used:
        raise bad_value("use_sliding_window", used, "true although layer_types has sliding layers")
    return windowed

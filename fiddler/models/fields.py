"""Typed reading of a ``config.json``: missing fields have defaults, wrong ones a sentence."""

from collections.abc import Mapping
from typing import Any

from fiddler.errors import CheckpointError

RawConfig = Mapping[str, Any]

# What a scaled RoPE must bring besides its type.
ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
DTYPES = ("float32", "bfloat16", "float16")
# These types compare wavelengths with the context of the pre-training.
_ROPE_WITH_ORIGINAL = ("yarn", "llama3")


def integer(raw: RawConfig, key: str, *, minimum: int = 1) -> int:
    """Return a whole number of at least ``minimum``."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise bad_value(key, value, f"a whole number of at least {minimum}")
    return value


def number(raw: RawConfig, key: str) -> float:
    """Return a positive finite number."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise bad_value(key, value, "a positive number")
    return float(value)


def boolean(raw: RawConfig, key: str) -> bool:
    """Return true or false; null counts as false."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise bad_value(key, value, "true or false")
    return bool(value)


def integers(raw: RawConfig, key: str) -> tuple[int, ...]:
    """Return a list of whole numbers; one number is a list of one, null an empty list."""
    value = raw.get(key)
    items = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise bad_value(key, value, "a whole number or a list of them")
    return tuple(items)


def bad_value(key: str, value: object, wanted: str) -> CheckpointError:
    """Return the error for one value of ``config.json`` that cannot be right."""
    return CheckpointError(f"config.json has {key} = {value!r}, which is not {wanted}")


def unsupported(key: str, value: object, why: str) -> CheckpointError:
    """Return the error for a feature that fiddler does not compute."""
    return CheckpointError(
        f"config.json asks for {key} = {value!r}, which fiddler does not support: {why}"
    )


def common(raw: RawConfig) -> dict[str, Any]:
    """Return the ``ModelConfig`` arguments that all architectures read alike."""
    if raw.get("hidden_act", "silu") != "silu":
        raise unsupported("hidden_act", raw["hidden_act"], "experts compute silu(gate) * up")
    hidden, heads = integer(raw, "hidden_size"), integer(raw, "num_attention_heads")
    kv_heads = _integer_or(raw, "num_key_value_heads", heads)
    head_dim = _integer_or(raw, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise bad_value("num_key_value_heads", kv_heads, f"a divisor of {heads} attention heads")
    if head_dim % 2 or head_dim == 0:
        raise bad_value("head_dim", head_dim, "an even number, as RoPE needs")
    bos = integers(raw, "bos_token_id")
    return {
        "vocab_size": integer(raw, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": integer(raw, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": number(raw, "rms_norm_eps"),
        "tie_embeddings": boolean(raw, "tie_word_embeddings"),
        "eos_token_ids": integers(raw, "eos_token_id"),
        "bos_token_id": bos[0] if bos else None,
        **_experts(raw),
        **_dtype(raw),
        **_rope(raw),
    }


def sparse_step_dense_layers(raw: RawConfig) -> frozenset[int]:
    """Return the layers that Qwen's ``decoder_sparse_step`` and ``mlp_only_layers`` leave dense."""
    step = integer(raw, "decoder_sparse_step")
    listed = set(integers(raw, "mlp_only_layers"))
    layers = range(integer(raw, "num_hidden_layers"))
    return frozenset(i for i in layers if i in listed or (i + 1) % step)


def refuse_window(raw: RawConfig) -> None:
    """Refuse a sliding window in an architecture whose reference has none."""
    if raw.get("sliding_window"):
        raise unsupported("sliding_window", raw["sliding_window"], "this architecture has none")


def _integer_or(raw: RawConfig, key: str, default: int) -> int:
    return default if raw.get(key) is None else integer(raw, key)


def _experts(raw: RawConfig) -> dict[str, int]:
    # Mixtral's spelling, in which transformers 5 also saves Qwen3-MoE; our defaults use the other
    key = "num_experts" if raw.get("num_local_experts") is None else "num_local_experts"
    experts, top_k = integer(raw, key), integer(raw, "num_experts_per_tok")
    if top_k > experts:
        raise bad_value("num_experts_per_tok", top_k, f"at most the {experts} experts")
    return {"num_experts": experts, "top_k": top_k}


def _dtype(raw: RawConfig) -> dict[str, str]:
    value = raw.get("dtype") or raw.get("torch_dtype")
    if value is None:
        return {}
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise unsupported("dtype", value, f"it reads {', '.join(DTYPES)}")
    return {"dtype": name}


def _rope(raw: RawConfig) -> dict[str, Any]:
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise bad_value("rope_scaling", given, "an object")
    max_position = integer(raw, "max_position_embeddings")
    rope = {"rope_theta": raw["rope_theta"], **given}
    scaling = _rope_scaling(raw, rope, max_position)
    if scaling.get("rope_type") == "yarn":
        # Qwen's cards add YaRN without raising max_position_embeddings
        stretched = scaling["factor"] * scaling["original_max_position_embeddings"]
        max_position = max(max_position, int(stretched))
    return {
        "rope_theta": number(rope, "rope_theta"),
        "rope_scaling": scaling,
        "max_position": max_position,
    }


def _rope_scaling(raw: RawConfig, rope: RawConfig, max_position: int) -> dict[str, Any]:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_FACTORS:
        raise unsupported("rope_type", kind, f"it knows {', '.join(ROPE_FACTORS)}")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported("rope_parameters", sorted(rope), "it uses one RoPE for all layers")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise unsupported("partial_rotary_factor", partial, "it rotates whole heads")
    if kind == "default":
        return {}
    scaling = {k: v for k, v in rope.items() if k not in ("type", "rope_theta") and v is not None}
    scaling["rope_type"] = kind
    if kind in _ROPE_WITH_ORIGINAL:
        outer = raw.get("original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = outer or scaling.get(
            "original_max_position_embeddings", max_position
        )
        number(scaling, "original_max_position_embeddings")
    if kind == "yarn":
        scaling.setdefault("factor", max_position / scaling["original_max_position_embeddings"])
        number(scaling, "factor")
    for key in ROPE_FACTORS[kind]:
        number(scaling, key)
    return scaling

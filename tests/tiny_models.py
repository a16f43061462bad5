"""Tiny seeded checkpoints of every architecture, built by ``transformers``: the oracle's own files.

All parameters are random, norm weights around one and biases around zero, so that a forgotten one
shows. The sizes are ragged on purpose, and each architecture turns on what only it has.
"""

import functools
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

MODEL_TYPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
VOCAB_SIZE = 264  # 256 bytes, 3 special tokens, 5 ids without a token, as padded vocabularies have
EOS_ID, BOS_ID = 256, 257

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": EOS_ID,
    "bos_token_id": BOS_ID,
    "pad_token_id": None,
}
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 48},
    "olmoe": {
        "num_experts": 8,
        "intermediate_size": 48,
        "num_experts_per_tok": 3,
        "clip_qkv": 1.5,
    },
    "qwen2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 72,
        "intermediate_size": 96,
        "mlp_only_layers": [1],
        "num_experts_per_tok": 3,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 56,
        "intermediate_size": 96,
        "head_dim": 24,
        "norm_topk_prob": True,
        "attention_bias": True,
        "num_experts_per_tok": 3,
    },
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tiny(
    model_type: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    sharded: bool = False,
    **overrides: Any,
) -> Path:
    """Save a model, its tokenizer and its chat template in ``folder`` and return the folder.

    ``overrides`` are ``config.json`` fields in the spelling of ``transformers``.
    """
    model = _build(model_type, seed, dtype, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="50KB" if sharded else "1GB")
    _save_tokenizer(folder)
    return folder


def shared_tiny(model_type: str, *, dtype: str = "float32", **overrides: Any) -> Path:
    """Return a folder like :func:`make_tiny`'s, built once per process. Do not change its files."""
    return _shared(model_type, dtype, json.dumps(overrides, sort_keys=True))


def load_oracle(folder: Path, dtype: str = "float32") -> Any:
    """Return the ``transformers`` model of a folder, in ``dtype`` and evaluation mode."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations are none of ours
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", local_files_only=True
        )
    return model.eval()


@functools.cache
def _shared(model_type: str, dtype: str, overrides: str) -> Path:
    keeper = tempfile.TemporaryDirectory(prefix="fiddler-tiny-")
    _KEEPERS.append(keeper)
    return make_tiny(model_type, Path(keeper.name), dtype=dtype, **json.loads(overrides))


_KEEPERS: list[tempfile.TemporaryDirectory[str]] = []  # removed with the process


def _build(model_type: str, seed: int, dtype: str, overrides: dict[str, Any]) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fields = _COMMON | _OWN[model_type] | overrides
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.AutoConfig.for_model(model_type, **fields)
        model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    return model.to(getattr(torch, dtype))


def randomise(model: Any, seed: int) -> None:
    """Give every parameter a seeded value; projections keep their input's scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(generator=generator)
            if name.endswith("norm.weight"):
                parameter.mul_(0.3).add_(1.0)
            elif parameter.dim() == 1:
                parameter.mul_(0.3)
            elif "embed" not in name:
                parameter.mul_(parameter.shape[-1] ** -0.5)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|begin|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "bos_token": "<|begin|>",
        "pad_token": "<|pad|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_v4_spelling(folder: Path) -> None:
    """Rewrite ``config.json`` as older releases did: rope_theta, rope_scaling, torch_dtype."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    path.write_text(json.dumps(raw, indent=1))

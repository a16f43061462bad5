"""Writes the trained model as a folder in the Hugging Face layout of Qwen3-MoE."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from scripts.tiny.model import Layer, TinyConfig, TinyModel
from scripts.tiny.rows import CHAT_TEMPLATE, END, END_OF_TEXT, START


def export_folder(model: TinyModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write weights (bfloat16), configs, tokenizer and chat template into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = tokenizer.get_vocab()
    end_ids = [vocabulary[END], vocabulary[END_OF_TEXT]]
    _write_json(folder / "config.json", model_config(model.config, end_ids))
    generation = {"do_sample": False, "eos_token_id": end_ids, "pad_token_id": end_ids[1]}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(model.config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def named_tensors(model: TinyModel) -> dict[str, Tensor]:
    """Return the weights by their names in a Qwen3-MoE checkpoint; the head is the embedding."""
    tensors: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embed,
        "model.norm.weight": model.final_norm.weight,
    }
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        for name, tensor in _layer_tensors(layer).items():
            tensors[f"model.layers.{number}.{name}.weight"] = tensor
    return {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in tensors.items()
    }


def _layer_tensors(layer: Layer) -> dict[str, Tensor]:
    attention, experts = layer.attention, layer.experts
    tensors: dict[str, Tensor] = {
        "input_layernorm": layer.input_norm.weight,
        "post_attention_layernorm": layer.post_norm.weight,
        "self_attn.q_proj": attention.q_proj,
        "self_attn.k_proj": attention.k_proj,
        "self_attn.v_proj": attention.v_proj,
        "self_attn.o_proj": attention.o_proj,
        "self_attn.q_norm": attention.q_norm.weight,
        "self_attn.k_norm": attention.k_norm.weight,
        "mlp.gate": experts.router,
    }
    for expert in range(experts.router.shape[0]):
        tensors[f"mlp.experts.{expert}.gate_proj"] = experts.gate_EIH[expert]
        tensors[f"mlp.experts.{expert}.up_proj"] = experts.up_EIH[expert]
        tensors[f"mlp.experts.{expert}.down_proj"] = experts.down_EHI[expert]
    return tensors


def model_config(config: TinyConfig, end_ids: list[int]) -> dict[str, object]:
    """Return ``config.json`` in the spelling that published Qwen3-MoE checkpoints have."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "eos_token_id": end_ids[0],
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.num_experts_per_token * config.expert_size,
        "max_position_embeddings": config.max_positions,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": True,
        "num_attention_heads": config.num_heads,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "output_router_logits": False,
        "pad_token_id": end_ids[1],
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "router_aux_loss_coef": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def _tokenizer_config(config: TinyConfig) -> dict[str, object]:
    return {
        "additional_special_tokens": [START, END],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": config.max_positions,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

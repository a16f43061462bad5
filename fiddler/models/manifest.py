"""Which tensors a checkpoint of a ``ModelConfig`` holds, and which of them are fused in memory.

One table serves the check of a checkpoint, the loading, and the count of bytes.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import WeightKind
from fiddler.models.config import ModelConfig, QKNorm


class Part(NamedTuple):
    """One stored tensor: numbers, or the bytes of a packed expert."""

    name: str
    shape: tuple[int, ...]
    is_packed: bool = False


Parts = tuple[Part, ...]  # stacked along the first dimension into one tensor


def model_parts(config: ModelConfig) -> dict[str, Parts]:
    """Return field of ``DenseWeights`` -> its tensors; a tied head is no tensor of its own."""
    names, vocab, hidden = config.names, config.vocab_size, config.hidden_size
    fields: dict[str, Parts] = {
        "embed_VH": (Part(names.embed, (vocab, hidden)),),
        "final_norm_H": (Part(names.final_norm, (hidden,)),),
    }
    if not config.tie_embeddings:
        fields["lm_head_VH"] = (Part(names.lm_head, (vocab, hidden)),)
    return fields


def layer_parts(config: ModelConfig, layer: int) -> dict[str, Parts]:
    """Return field of ``LayerWeights`` -> its tensors, without the fields that the layer lacks."""
    names, hidden = config.names, config.hidden_size
    norms: dict[str, Parts] = {
        "input_norm_H": (Part(names.input_norm, (hidden,)),),
        "post_attention_norm_H": (Part(names.post_attention_norm, (hidden,)),),
    }
    ffn = _moe_parts(config) if config.is_moe_layer(layer) else _dense_parts(config)
    fields = norms | _attention_parts(config) | ffn
    return {
        field: tuple(Part(part.name.format(l=layer), part.shape) for part in parts)
        for field, parts in fields.items()
    }


def expert_parts(config: ModelConfig, layer: int, expert: int) -> tuple[Part, Part, Part]:
    """Return gate, up and down of one routed expert."""
    names, hidden, width = config.names, config.hidden_size, config.expert_size
    return (
        Part(names.expert_gate.format(l=layer, e=expert), (width, hidden)),
        Part(names.expert_up.format(l=layer, e=expert), (width, hidden)),
        Part(names.expert_down.format(l=layer, e=expert), (hidden, width)),
    )


def packed_shape(config: ModelConfig, kind: WeightKind) -> PackedShape:
    """Return the sizes of one routed expert in packed bytes."""
    return PackedShape(kind, *config.expert_sides)


def packed_part(config: ModelConfig, kind: WeightKind, layer: int, expert: int) -> Part:
    """Return the bytes that hold gate, up and down of one routed expert in a packed checkpoint.

    ``kind`` is that of all layers, unless the config says that they differ.
    """
    stem = config.names.expert_gate.format(l=layer, e=expert).removesuffix(".weight")
    size = packed_shape(config, config.packed_kind(kind, layer)).expert_bytes
    return Part(f"{stem.rpartition('.')[0]}.packed", (size,), is_packed=True)


def all_parts(config: ModelConfig) -> Iterator[Part]:
    """Yield every tensor that a complete checkpoint holds."""
    yield from dense_parts(config)
    for layer in range(config.num_layers):
        for expert in range(config.num_experts) if config.is_moe_layer(layer) else ():
            yield from _stored_parts(config, layer, expert)


def dense_parts(config: ModelConfig) -> Iterator[Part]:
    """Yield everything but the routed experts."""
    for group in model_parts(config).values():
        yield from group
    for layer in range(config.num_layers):
        for group in layer_parts(config, layer).values():
            yield from group


def _stored_parts(config: ModelConfig, layer: int, expert: int) -> Parts:
    if config.packed is None:
        return expert_parts(config, layer, expert)
    return (packed_part(config, config.packed, layer, expert),)


def dense_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Return the exact bytes of ``DenseWeights``: everything but the routed experts."""
    return dtype_bytes * sum(prod(part.shape) for part in dense_parts(config))


def _attention_parts(config: ModelConfig) -> dict[str, Parts]:
    names, hidden, dim = config.names, config.hidden_size, config.head_dim
    q_size, kv_size = config.num_heads * dim, config.num_kv_heads * dim
    qkv = ((names.q, q_size), (names.k, kv_size), (names.v, kv_size))
    fields: dict[str, Parts] = {
        "qkv_FH": tuple(Part(f"{name}.weight", (rows, hidden)) for name, rows in qkv),
        "o_HF": (Part(f"{names.o}.weight", (hidden, q_size)),),
    }
    if config.qkv_bias:
        fields["qkv_bias_F"] = tuple(Part(f"{name}.bias", (rows,)) for name, rows in qkv)
    if config.o_bias:
        fields["o_bias_H"] = (Part(f"{names.o}.bias", (hidden,)),)
    if config.qk_norm is not QKNorm.NONE:
        per_head = config.qk_norm is QKNorm.PER_HEAD
        fields["q_norm"] = (Part(names.q_norm, (dim if per_head else q_size,)),)
        fields["k_norm"] = (Part(names.k_norm, (dim if per_head else kv_size,)),)
    return fields


def _moe_parts(config: ModelConfig) -> dict[str, Parts]:
    names, hidden, width = config.names, config.hidden_size, config.shared_size
    fields: dict[str, Parts] = {"router_EH": (Part(names.router, (config.num_experts, hidden)),)}
    if width:
        fields |= {
            "shared_gate_up_FH": (
                Part(names.shared_gate, (width, hidden)),
                Part(names.shared_up, (width, hidden)),
            ),
            "shared_down_HF": (Part(names.shared_down, (hidden, width)),),
            "shared_router_1H": (Part(names.shared_router, (1, hidden)),),
        }
    return fields


def _dense_parts(config: ModelConfig) -> dict[str, Parts]:
    names, hidden, width = config.names, config.hidden_size, config.dense_size
    return {
        "dense_gate_up_FH": (
            Part(names.dense_gate, (width, hidden)),
            Part(names.dense_up, (width, hidden)),
        ),
        "dense_down_HF": (Part(names.dense_down, (hidden, width)),),
    }

"""What the engine needs to know of a model: a frozen record that every architecture fills.

Differences between architectures are fields here, never an ``if model_type ==`` further down.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cpu_kernels.activation_reference import Activation
from cpu_kernels.weight_kind import PACKED_KINDS, WeightKind
from fiddler.models.foreign.layout import Layout
from fiddler.models.outliers import padded_size

KIND_JOINT = "+"


class QKNorm(StrEnum):
    """Where RMSNorm is applied to queries and keys before RoPE."""

    NONE = "none"
    PER_HEAD = "per_head"  # over head_dim, one weight of [head_dim] (Qwen3)
    FULL = "full"  # over all heads at once, one weight of [heads * head_dim] (OLMoE)


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Checkpoint names; ``{l}`` is the layer and ``{e}`` the expert. ``""``: the model has none.

    Every projection is stored ``[out_features, in_features]``.
    """

    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    lm_head: str = "lm_head.weight"
    input_norm: str = "model.layers.{l}.input_layernorm.weight"
    post_attention_norm: str = "model.layers.{l}.post_attention_layernorm.weight"
    q: str = "model.layers.{l}.self_attn.q_proj"  # + .weight / .bias
    k: str = "model.layers.{l}.self_attn.k_proj"
    v: str = "model.layers.{l}.self_attn.v_proj"
    o: str = "model.layers.{l}.self_attn.o_proj"
    q_norm: str = ""
    k_norm: str = ""
    router: str = "model.layers.{l}.mlp.gate.weight"
    expert_gate: str = "model.layers.{l}.mlp.experts.{e}.gate_proj.weight"
    expert_up: str = "model.layers.{l}.mlp.experts.{e}.up_proj.weight"
    expert_down: str = "model.layers.{l}.mlp.experts.{e}.down_proj.weight"
    shared_gate: str = ""
    shared_up: str = ""
    shared_down: str = ""
    shared_router: str = ""
    # dense FFN of a layer that has no experts (Qwen's mlp_only_layers)
    dense_gate: str = "model.layers.{l}.mlp.gate_proj.weight"
    dense_up: str = "model.layers.{l}.mlp.up_proj.weight"
    dense_down: str = "model.layers.{l}.mlp.down_proj.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and switches of one decoder-only MoE model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    expert_size: int  # width of one routed expert
    names: WeightNames

    activation: Activation = "silu"  # of experts, whatever their layer
    dense_size: int = 0  # width of the FFN in layers without experts
    dense_layers: frozenset[int] = frozenset()  # layers without experts
    shared_size: int = 0  # width of the shared expert; 0: none
    norm_topk: bool = True  # renormalise the top-k probabilities to sum 1
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    clip_qkv: float | None = None
    sliding_window: int | None = None  # tokens seen back, self included; None: all
    window_layers: frozenset[int] = frozenset()  # layers where sliding_window holds
    rope_theta: float = 10_000.0
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # empty: plain RoPE
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    max_position: int = 4096
    dtype: str = "bfloat16"  # as stored
    packed: WeightKind | None = None  # what stored routed experts are, or become, if quantised
    mixed: tuple[WeightKind, ...] = ()  # of each layer, where layers have several packed kinds
    foreign: Layout | None = None  # how another program stored them
    outliers: tuple[tuple[int, ...], ...] = ()  # of each layer: inputs of 8-bit columns, as many
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def architecture(self) -> str:
        """What a routing profile is bound to: sizes, which quantising and renaming leave alone."""
        return (
            f"{self.model_type}, {self.num_layers} layers, {self.top_k} of {self.num_experts} "
            f"experts of {self.hidden_size} x {self.expert_size}"
        )

    @property
    def packed_name(self) -> str | None:
        """Of stored packed experts: their kind; of several kinds all, joined by ``+``."""
        if self.packed is None or not self.mixed:
            return None if self.packed is None else self.packed.name
        used = {kind for layer, kind in enumerate(self.mixed) if self.is_moe_layer(layer)}
        return KIND_JOINT.join(kind.name for kind in PACKED_KINDS if kind in used)

    def packed_kind(self, kind: WeightKind, layer: int) -> WeightKind:
        """What a layer's experts are: ``kind``, unless layers differ."""
        return self.mixed[layer] if self.mixed else kind

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` routes to experts (otherwise it has one dense FFN)."""
        return layer not in self.dense_layers

    @property
    def expert_sides(self) -> tuple[int, int]:
        """Inputs of gate and up, and of down, as experts lie in memory."""
        count = max(map(len, self.outliers), default=0)
        if self.packed is None or not count:
            return self.hidden_size, self.expert_size
        group = self.packed.group
        return (
            padded_size(self.hidden_size, count, group),
            padded_size(self.expert_size, count, group),
        )

    @property
    def expert_numel(self) -> int:
        """Weights of one routed expert: gate, up and down."""
        return 3 * self.hidden_size * self.expert_size

"""The decoder: one forward pass over a ragged batch, the same for every architecture.

    embed -> [ norm, qkv, (q/k norm), rope + append + paged attention, o,
               norm, router -> routed experts || shared expert, add ] x layers -> norm -> head

Shapes: T tokens, H hidden, N query heads, M key/value heads, D head dim, F = (N + 2M) * D,
E experts, K top-k, V vocabulary, R rows that need logits.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig, QKNorm
from fiddler.models.kernels import DeviceKernels
from fiddler.models.weights import DenseWeights, LayerWeights


class PendingExperts(Protocol):
    """A layer's routed experts under way."""

    def result(self) -> torch.Tensor:
        """Wait for all sides and return their float32 sum ``[T, H]``."""
        ...


class ExpertBackend(Protocol):
    """Computes routed experts, wherever their weights lie."""

    def launch(
        self, layer: int, x_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> PendingExperts: ...


class Decoder:
    """A decoder-only MoE transformer over paged KV."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseWeights,
        kernels: DeviceKernels,
        experts: ExpertBackend,
    ) -> None:
        self.config = config
        self._weights = weights
        self._kernels = kernels
        self._experts = experts

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_caches: list[torch.Tensor]) -> torch.Tensor:
        """Return the final normed hidden states ``[T, H]`` and fill the KV of the step's tokens."""
        self._kernels.plan(batch)
        x_TH = F.embedding(batch.tokens_T, self._weights.embed_VH)
        for index, (layer, kv_cache) in enumerate(
            zip(self._weights.layers, kv_caches, strict=True)
        ):
            x_TH = x_TH + self._attention(
                index, layer, self._norm(x_TH, layer.input_norm_H), kv_cache
            )
            y_TH = self._norm(x_TH, layer.post_attention_norm_H)
            x_TH = x_TH + self._ffn(index, layer, y_TH, batch.drawn_LTK)
        return self._norm(x_TH, self._weights.final_norm_H)

    @torch.inference_mode()
    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Float32 logits ``[R, V]`` of some rows of :meth:`forward`'s result."""
        return F.linear(hidden_RH, self._weights.lm_head_VH).float()

    def _norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x_TH, weight_H)

    def _attention(
        self, index: int, layer: LayerWeights, x_TH: torch.Tensor, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        c = self.config
        qkv_TF = F.linear(x_TH, layer.qkv_FH, layer.qkv_bias_F)
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        q_TQ, k_TM, v_TM = qkv_TF.split_with_sizes((q_width, kv_width, kv_width), dim=-1)
        if c.qk_norm is QKNorm.FULL:
            q_norm, k_norm = _norms(layer)
            q_TQ, k_TM = self._norm(q_TQ, q_norm), self._norm(k_TM, k_norm)
        if c.clip_qkv is not None:
            q_TQ, k_TM, v_TM = (x.clamp(-c.clip_qkv, c.clip_qkv) for x in (q_TQ, k_TM, v_TM))
        out_TND = self._kernels.attention(
            q_TQ.view(-1, c.num_heads, c.head_dim),
            k_TM.view(-1, c.num_kv_heads, c.head_dim),
            v_TM.view(-1, c.num_kv_heads, c.head_dim),
            kv_cache,
            window=c.sliding_window if index in c.window_layers else None,
            head_norms=_norms(layer) if c.qk_norm is QKNorm.PER_HEAD else None,
        )
        return F.linear(out_TND.flatten(1), layer.o_HF, layer.o_bias_H)

    def _ffn(
        self, index: int, layer: LayerWeights, x_TH: torch.Tensor, drawn_LTK: torch.Tensor | None
    ) -> torch.Tensor:
        if layer.router_EH is None:
            assert layer.dense_gate_up_FH is not None and layer.dense_down_HF is not None
            return self._gated(x_TH, layer.dense_gate_up_FH, layer.dense_down_HF)
        ids_TK, weights_TK = route(x_TH, layer.router_EH, self.config)
        if drawn_LTK is not None:
            ids_TK = drawn_LTK[index]
        pending = self._experts.launch(index, x_TH, ids_TK, weights_TK)
        shared_TH = self._shared_expert(layer, x_TH)  # while the experts are under way
        y_TH = pending.result()
        return (y_TH if shared_TH is None else y_TH + shared_TH).to(x_TH.dtype)

    def _shared_expert(self, layer: LayerWeights, x_TH: torch.Tensor) -> torch.Tensor | None:
        if layer.shared_gate_up_FH is None:
            return None
        assert layer.shared_down_HF is not None and layer.shared_router_1H is not None
        y_TH = self._gated(x_TH, layer.shared_gate_up_FH, layer.shared_down_HF)
        return torch.sigmoid(F.linear(x_TH, layer.shared_router_1H)) * y_TH

    def _gated(
        self, x_TH: torch.Tensor, gate_up_FH: torch.Tensor, down_HF: torch.Tensor
    ) -> torch.Tensor:
        return F.linear(self._kernels.silu_mul(F.linear(x_TH, gate_up_FH)), down_HF)


def _norms(layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.q_norm is not None and layer.k_norm is not None
    return layer.q_norm, layer.k_norm


def route(
    x_TH: torch.Tensor, router_EH: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's expert ids ``[T, K]`` int64 and weights ``[T, K]`` float32."""
    probs_TE = F.linear(x_TH, router_EH).softmax(dim=-1, dtype=torch.float32)
    weights_TK, ids_TK = probs_TE.topk(config.top_k, dim=-1)
    if config.norm_topk:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return ids_TK, weights_TK

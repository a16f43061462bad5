"""The decoder: one forward pass over a ragged batch, the same for every architecture.

    embed -> [ norm, qkv, (q/k norm), rope + append + paged attention, o,
               add + norm + router -> routed experts || shared expert, add + norm ] x layers -> head

An addition to the residual stream and the norm after it are one operation, whose norm is the next
block's; where experts follow, the router's choice is part of it. There are two ways to run it,
which differ in what is plugged in and not here: with experts that a step's routing on the host
divides, or with experts that the device divides, which a CUDA graph can hold.

Shapes: T tokens, H hidden, N query heads, M key/value heads, D head dim, F = (N + 2M) * D,
E experts, K top-k, V vocabulary, R rows that need logits.
"""

from typing import Protocol, Self

import torch
import torch.nn.functional as F

from fiddler.models.batch import StepBatch
from fiddler.models.config import ModelConfig, QKNorm
from fiddler.models.kernels import DeviceKernels
from fiddler.models.kv_cache import LayerKV
from fiddler.models.weights import DenseWeights, LayerWeights
from gpu_kernels.host_words import Bell


class PendingExperts(Protocol):
    """A layer's routed experts under way."""

    def parts(self) -> tuple[torch.Tensor, ...]:
        """Await all sides but the ``late`` one; their float32 parts ``[T, H]``, one to three.

        They are to be added in this order, lie on the device or in mapped host memory, and are good
        until the next launch.
        """
        ...

    @property
    def late(self) -> Bell | None:
        """What whoever reads the last part waits for; None: all parts are there."""
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

    def plugged(self, kernels: DeviceKernels, experts: ExpertBackend) -> Self:
        """The same model on the same weights with other kernels and experts."""
        return type(self)(self.config, self._weights, kernels, experts)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv_caches: list[LayerKV]) -> torch.Tensor:
        """Return the final normed hidden states ``[T, H]`` and fill the KV of the step's tokens."""
        layers, kernels = self._weights.layers, self._kernels
        kernels.plan(batch)
        x_TH = kernels.embedding(batch.tokens_T, self._weights.embed_VH)
        y_TH = kernels.rms_norm(x_TH, layers[0].input_norm_H)
        next_norms = [*(layer.input_norm_H for layer in layers[1:]), self._weights.final_norm_H]
        for index, layer in enumerate(layers):
            drawn_TK = None if batch.drawn_LTK is None else batch.drawn_LTK[index]
            y_TH, x_TH = self.block(
                *(index, layer, y_TH, x_TH, kv_caches[index], next_norms[index], drawn_TK)
            )
        return y_TH

    @torch.inference_mode()
    def block(
        self,
        index: int,
        layer: LayerWeights,
        y_TH: torch.Tensor,
        x_TH: torch.Tensor,
        kv_cache: LayerKV,
        next_norm_H: torch.Tensor,
        drawn_TK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer of a planned batch, from the normed ``y_TH`` and the residual stream ``x_TH``.

        Returns the same two for the next layer.
        """
        c, norm_H = self.config, layer.post_attention_norm_H
        y_TH = self._attention(index, layer, y_TH, kv_cache)
        if layer.router_EH is None:
            y_TH, x_TH = self._kernels.add_rms_norm(y_TH, x_TH, norm_H)
            return self._kernels.add_rms_norm(self._dense_ffn(layer, y_TH), x_TH, next_norm_H)
        y_TH, x_TH, ids_TK, weights_TK = self._kernels.norm_route(
            y_TH, x_TH, norm_H, layer.router_EH, c.top_k, renormalise=c.norm_topk
        )
        ids_TK = ids_TK if drawn_TK is None else drawn_TK
        pending = self._experts.launch(index, _expert_inputs(layer, y_TH), ids_TK, weights_TK)
        shared_TH = self._shared_expert(layer, y_TH)  # while the experts are under way
        parts = tuple(part[:, : c.hidden_size] for part in pending.parts())
        return self._kernels.add_parts(x_TH, parts, shared_TH, next_norm_H, pending.late)

    @torch.inference_mode()
    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Float32 logits ``[R, V]`` of some rows of :meth:`forward`'s result."""
        return F.linear(hidden_RH, self._weights.lm_head_VH).float()

    def _attention(
        self, index: int, layer: LayerWeights, x_TH: torch.Tensor, kv_cache: LayerKV
    ) -> torch.Tensor:
        c = self.config
        qkv_TF = self._kernels.linear(x_TH, layer.qkv_FH, layer.qkv_bias_F)
        q_width, kv_width = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        q_TQ, k_TM, v_TM = qkv_TF.split_with_sizes((q_width, kv_width, kv_width), dim=-1)
        if c.qk_norm is QKNorm.FULL:
            q_norm, k_norm = _norms(layer)
            q_TQ = self._kernels.rms_norm(q_TQ, q_norm)
            k_TM = self._kernels.rms_norm(k_TM, k_norm)
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
        return self._kernels.linear(out_TND.flatten(1), layer.o_HF, layer.o_bias_H)

    def _dense_ffn(self, layer: LayerWeights, x_TH: torch.Tensor) -> torch.Tensor:
        assert layer.dense_gate_up_FH is not None and layer.dense_down_HF is not None
        return self._gated(x_TH, layer.dense_gate_up_FH, layer.dense_down_HF)

    def _shared_expert(self, layer: LayerWeights, x_TH: torch.Tensor) -> torch.Tensor | None:
        if layer.shared_gate_up_FH is None:
            return None
        assert layer.shared_down_HF is not None and layer.shared_router_1H is not None
        y_TH = self._gated(x_TH, layer.shared_gate_up_FH, layer.shared_down_HF)
        return torch.sigmoid(F.linear(x_TH, layer.shared_router_1H)) * y_TH

    def _gated(
        self, x_TH: torch.Tensor, gate_up_FH: torch.Tensor, down_HF: torch.Tensor
    ) -> torch.Tensor:
        gate_up_TF = self._kernels.linear(x_TH, gate_up_FH)
        return self._kernels.linear(self._kernels.silu_mul(gate_up_TF), down_HF)


def _expert_inputs(layer: LayerWeights, x_TH: torch.Tensor) -> torch.Tensor:
    order_X = layer.expert_inputs_X
    return x_TH if order_X is None else x_TH.index_select(1, order_X)


def _norms(layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor]:
    assert layer.q_norm is not None and layer.k_norm is not None
    return layer.q_norm, layer.k_norm

"""The plain reference: the whole model in a hundred lines of torch, no paging, batch or placement.

It shares no code with the decoder, so that agreement of the two means something.

Legend: T new tokens, L tokens so far, H hidden, N query heads, M key/value heads, D head dim,
I width of a feed-forward, E experts, K top-k, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.config import ModelConfig, QKNorm
from fiddler.models.manifest import all_parts
from fiddler.models.rope import rope_tables
from fiddler.models.weights import WeightSource


def reference_logits(
    source: WeightSource,
    config: ModelConfig,
    token_ids: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return float32 logits ``[T, V]`` of all positions of one prompt, computed in ``dtype``."""
    return Reference(source, config, dtype).forward(token_ids)


def reference_greedy(
    source: WeightSource,
    config: ModelConfig,
    prompt_ids: Sequence[int],
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Return the most likely continuation; an id of ``eos_ids`` ends it and is part of it."""
    model = Reference(source, config, dtype)
    generated: list[int] = []
    feed = list(prompt_ids)
    while len(generated) < max_tokens and not (generated and generated[-1] in eos_ids):
        feed = [int(model.forward(feed)[-1].argmax())]
        generated += feed
    return generated


class Reference:
    """One sequence's state: all weights in one dtype, and the keys and values seen so far."""

    def __init__(self, source: WeightSource, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        self._source = source
        self._dtype = dtype
        self._shapes = {part.name: part.shape for part in all_parts(config)}
        self._weights: dict[str, Tensor] = {}
        self._kv_cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._past = 0

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int]) -> Tensor:
        """Append the tokens and return their float32 logits ``[T, V]``."""
        c, names = self.config, self.config.names
        embed_VH = self._weight(names.embed)
        x_TH = embed_VH[torch.tensor(token_ids)]
        for layer in range(c.num_layers):
            x_TH = x_TH + self._attention(layer, self._norm(x_TH, names.input_norm, layer))
            h_TH = self._norm(x_TH, names.post_attention_norm, layer)
            x_TH = x_TH + (self._moe if c.is_moe_layer(layer) else self._dense)(layer, h_TH)
        self._past += len(token_ids)
        head_VH = embed_VH if c.tie_embeddings else self._weight(names.lm_head)
        return F.linear(self._norm(x_TH, names.final_norm), head_VH).float()

    def _attention(self, layer: int, x_TH: Tensor) -> Tensor:
        c, names = self.config, self.config.names
        q_TF, k_TF, v_TF = (self._linear(x_TH, n, layer) for n in (names.q, names.k, names.v))
        if c.qk_norm is QKNorm.FULL:
            q_TF, k_TF = (
                self._norm(q_TF, names.q_norm, layer),
                self._norm(k_TF, names.k_norm, layer),
            )
        if c.clip_qkv is not None:
            q_TF, k_TF, v_TF = (t.clamp(-c.clip_qkv, c.clip_qkv) for t in (q_TF, k_TF, v_TF))
        q_TND, k_TMD, v_TMD = (t.view(len(t), -1, c.head_dim) for t in (q_TF, k_TF, v_TF))
        if c.qk_norm is QKNorm.PER_HEAD:
            q_TND = self._norm(q_TND, names.q_norm, layer)
            k_TMD = self._norm(k_TMD, names.k_norm, layer)
        q_TND, k_TMD = self._rotate(q_TND), self._rotate(k_TMD)
        if layer in self._kv_cache:
            k_TMD = torch.cat((self._kv_cache[layer][0], k_TMD))
            v_TMD = torch.cat((self._kv_cache[layer][1], v_TMD))
        self._kv_cache[layer] = k_TMD, v_TMD

        share = c.num_heads // c.num_kv_heads  # query heads N = M * share read one key head
        k_LND, v_LND = k_TMD.repeat_interleave(share, 1), v_TMD.repeat_interleave(share, 1)
        scores_NTL = torch.einsum("tnd,lnd->ntl", q_TND, k_LND) * c.head_dim**-0.5
        scores_NTL = scores_NTL.masked_fill(~self._visible(layer, len(x_TH)), float("-inf"))
        probs_NTL = scores_NTL.softmax(dim=-1, dtype=torch.float32).to(self._dtype)
        out_TND = torch.einsum("ntl,lnd->tnd", probs_NTL, v_LND)
        return self._linear(out_TND.flatten(1), names.o, layer)

    def _visible(self, layer: int, num_tokens: int) -> Tensor:
        """Return which of the L positions each of the T new ones sees, bool ``[T, L]``."""
        key_L = torch.arange(self._past + num_tokens)
        query_T1 = key_L[self._past :, None]
        seen_TL = key_L <= query_T1
        if layer in self.config.window_layers:
            assert self.config.sliding_window is not None
            seen_TL &= key_L > query_T1 - self.config.sliding_window
        return seen_TL

    def _rotate(self, x_TND: Tensor) -> Tensor:
        """Turn the pairs (d, d + D/2) of every head by its position's angles."""
        cos_LR, sin_LR = rope_tables(self.config, self._past + len(x_TND))
        cos_T1R, sin_T1R = (t[self._past :, None].to(self._dtype) for t in (cos_LR, sin_LR))
        a_TNR, b_TNR = x_TND.chunk(2, dim=-1)
        return torch.cat(
            (a_TNR * cos_T1R - b_TNR * sin_T1R, b_TNR * cos_T1R + a_TNR * sin_T1R), dim=-1
        )

    def _moe(self, layer: int, x_TH: Tensor) -> Tensor:
        c, names = self.config, self.config.names
        router_EH = self._weight(names.router, layer)
        probs_TE = F.linear(x_TH, router_EH).softmax(dim=-1, dtype=torch.float32)
        top_TK, ids_TK = probs_TE.topk(c.top_k)
        if c.norm_topk:
            top_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for expert in torch.unique(ids_TK).tolist():
            tokens, slots = (ids_TK == expert).nonzero(as_tuple=True)
            triple = names.expert_gate, names.expert_up, names.expert_down
            out_TH = self._gated(x_TH[tokens], *triple, layer, expert)
            y_TH[tokens] += top_TK[tokens, slots, None] * out_TH
        if c.shared_size:
            triple = names.shared_gate, names.shared_up, names.shared_down
            gate_T1 = F.linear(x_TH, self._weight(names.shared_router, layer)).sigmoid()
            y_TH += gate_T1 * self._gated(x_TH, *triple, layer)
        return y_TH.to(self._dtype)

    def _dense(self, layer: int, x_TH: Tensor) -> Tensor:
        names = self.config.names
        return self._gated(x_TH, names.dense_gate, names.dense_up, names.dense_down, layer)

    def _gated(
        self, x_TH: Tensor, gate: str, up: str, down: str, layer: int, expert: int = 0
    ) -> Tensor:
        gate_IH, up_IH, down_HI = (self._weight(name, layer, expert) for name in (gate, up, down))
        return F.linear(F.silu(F.linear(x_TH, gate_IH)) * F.linear(x_TH, up_IH), down_HI)

    def _linear(self, x_TH: Tensor, name: str, layer: int) -> Tensor:
        bias = f"{name}.bias"
        has_bias = bias.format(l=layer) in self._shapes
        bias_F = self._weight(bias, layer) if has_bias else None
        return F.linear(x_TH, self._weight(f"{name}.weight", layer), bias_F)

    def _norm(self, x: Tensor, name: str, layer: int = 0) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self._weight(name, layer) * wide.to(self._dtype)

    def _weight(self, name: str, layer: int = 0, expert: int = 0) -> Tensor:
        name = name.format(l=layer, e=expert)
        if name not in self._weights:
            stored = self._source.tensor(name, self._shapes[name])
            self._weights[name] = stored.to(self._dtype)
        return self._weights[name]

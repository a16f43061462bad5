"""The training form of the built-in model: the maths of Qwen3-MoE, with all experts as one MLP.

A token runs through every expert and the router's weight (zero for those not chosen) scales each
expert's hidden units. That is 4 times the needed work, but three large matrix products instead of
a gather: at this size it is the fastest form on a large GPU.

Shape suffixes: R rows, S positions, T = R * S tokens, H hidden, N query heads, G KV heads, D head
dim, E experts, I expert width, K chosen experts, L layers, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from scripts.tiny.attention import attend

Mask = BlockMask | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """Shapes of the built-in model; the defaults are those that ship."""

    vocab_size: int = 1536
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_token: int = 4
    expert_size: int = 128
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-6
    max_positions: int = 4096


@dataclass(frozen=True, slots=True)
class Routing:
    """What the loss needs of one layer's router: logits, softmax and the weights of the chosen."""

    logits_TE: Tensor
    probs_TE: Tensor
    weights_TE: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x_f32 = x.float()
        scale = torch.rsqrt(x_f32.square().mean(-1, keepdim=True) + self.eps)
        return (x_f32 * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a norm on queries and keys before RoPE."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = _matrix(query_size, config.hidden_size)
        self.k_proj = _matrix(kv_size, config.hidden_size)
        self.v_proj = _matrix(kv_size, config.hidden_size)
        self.o_proj = nn.Parameter(torch.zeros(config.hidden_size, query_size))
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x_RSH: Tensor, rope: tuple[Tensor, Tensor], mask: Mask) -> Tensor:
        q_RNSD = self._rotated(self.q_norm, F.linear(x_RSH, self.q_proj), rope)
        k_RGSD = self._rotated(self.k_norm, F.linear(x_RSH, self.k_proj), rope)
        v_RGSD = self._heads(F.linear(x_RSH, self.v_proj)).transpose(1, 2)
        mixed_RNSD = attend(q_RNSD, k_RGSD, v_RGSD, mask)
        return F.linear(mixed_RNSD.transpose(1, 2).flatten(2), self.o_proj)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)

    def _rotated(self, norm: RMSNorm, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        normed: Tensor = norm(self._heads(x)).transpose(1, 2)
        cos_SD, sin_SD = rope
        low, high = normed.chunk(2, dim=-1)
        return (normed * cos_SD + torch.cat((-high, low), dim=-1) * sin_SD).to(x.dtype)


class Experts(nn.Module):
    """Router and experts; each expert is a SwiGLU MLP."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        count, width, hidden = config.num_experts, config.expert_size, config.hidden_size
        self.top_k = config.num_experts_per_token
        self.router = _matrix(count, hidden)
        self.gate_EIH = _matrix(count, width, hidden)
        self.up_EIH = _matrix(count, width, hidden)
        self.down_EHI = nn.Parameter(torch.zeros(count, hidden, width))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Routing]:
        routing = self.route(x_TH)
        per_expert = (-1, *self.gate_EIH.shape[:2])
        gate_TEI = F.linear(x_TH, self.gate_EIH.flatten(0, 1)).view(per_expert)
        up_TEI = F.linear(x_TH, self.up_EIH.flatten(0, 1)).view(per_expert)
        mid_TEI = F.silu(gate_TEI) * up_TEI * routing.weights_TE[:, :, None].to(x_TH.dtype)
        down_HF = self.down_EHI.transpose(0, 1).flatten(1)
        return F.linear(mid_TEI.flatten(1), down_HF), routing

    def route(self, x_TH: Tensor) -> Routing:
        """Softmax over all experts, then the top k made to sum to one."""
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = F.linear(x_TH.float(), self.router.float())
        probs_TE = logits_TE.softmax(-1)
        top_TK, chosen_TK = probs_TE.topk(self.top_k, dim=-1)
        top_TK = top_TK / top_TK.sum(-1, keepdim=True)
        return Routing(
            logits_TE, probs_TE, torch.zeros_like(probs_TE).scatter(1, chosen_TK, top_TK)
        )


class Layer(nn.Module):
    """Pre-norm attention and experts."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.post_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.experts = Experts(config)

    def forward(
        self, x_RSH: Tensor, rope: tuple[Tensor, Tensor], mask: Mask
    ) -> tuple[Tensor, Routing]:
        x_RSH = x_RSH + self.attention(self.input_norm(x_RSH), rope, mask)
        moved_TH, routing = self.experts(self.post_norm(x_RSH).flatten(0, 1))
        return x_RSH + moved_TH.view_as(x_RSH), routing


class TinyModel(nn.Module):
    """The whole model; input and output embeddings are one matrix."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = _matrix(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, ids_RS: Tensor, mask: Mask) -> tuple[Tensor, list[Routing]]:
        """Return logits of [T, V] and the routing of each layer."""
        x_RSH = F.embedding(ids_RS, self.embed)
        rope = rope_tables(self.config, ids_RS.shape[1], ids_RS.device)
        routings = []
        for layer in self.layers:
            x_RSH, routing = layer(x_RSH, rope, mask)
            routings.append(routing)
        return F.linear(self.final_norm(x_RSH).flatten(0, 1), self.embed), routings


def rope_tables(config: TinyConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of [S, D]; both halves of D hold the same frequencies."""
    exponents = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    frequencies = config.rope_theta**-exponents
    angles = torch.arange(length, device=device)[:, None] * frequencies[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.02)


# --- loss ---

# a row of 2,560 tokens holds fewer than this many conversations
_DOCUMENTS_PER_ROW = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of the side losses beside the cross entropy."""

    starvation: float = 0.01
    starvation_share: float = 0.25
    topic: float = 0.01
    router_z: float = 1e-4
    output_z: float = 1e-5


def weighted_loss(
    logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, z_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the loss with its z-term, and the plain mean cross entropy for reports."""
    logits_TV = logits_TV.float()
    norm_T = logits_TV.logsumexp(-1)
    entropy_T = norm_T - logits_TV.gather(1, targets_T[:, None])[:, 0]
    total = weights_T.sum().clamp_min(1.0)
    mean = (entropy_T * weights_T).sum() / total
    return mean + z_weight * (norm_T.square() * weights_T).sum() / total, mean.detach()


def router_loss(routing: Routing, documents_RS: Tensor, weights: LossWeights) -> Tensor:
    """Return the side losses of one layer's router; none of them asks for an even load."""
    chosen_TE = (routing.weights_TE > 0).float()
    share_TE = chosen_TE / chosen_TE.sum(-1, keepdim=True)
    z = routing.logits_TE.logsumexp(-1).square().mean()
    return (
        weights.starvation * starvation(share_TE, routing.probs_TE, weights.starvation_share)
        + weights.topic * topic_spread(share_TE, routing.probs_TE, documents_RS)
        + weights.router_z * z
    )


def starvation(share_TE: Tensor, probs_TE: Tensor, floor: float) -> Tensor:
    """Pull up the experts that are chosen less than ``floor`` times the even share.

    Popular experts stay popular: the routing is meant to be uneven, only not dead.
    """
    floor = floor / share_TE.shape[1]
    starving_E = ((floor - share_TE.mean(0)) / floor).clamp_min(0.0)
    return -(starving_E * probs_TE.mean(0).clamp_min(1e-6).log()).sum()


def topic_spread(share_TE: Tensor, probs_TE: Tensor, documents_RS: Tensor) -> Tensor:
    """Entropy of the expert shares within a document, less most of the entropy over all.

    Low when each document keeps to few experts and different documents to different ones. The
    value is that of the actual choices, the gradient that of the probabilities.
    """
    share_TE = share_TE + probs_TE - probs_TE.detach()
    rows = torch.arange(len(documents_RS), device=documents_RS.device)[:, None]
    slots = len(documents_RS) * _DOCUMENTS_PER_ROW
    slot_T = (rows * _DOCUMENTS_PER_ROW + documents_RS.clamp_max(_DOCUMENTS_PER_ROW - 1)).flatten()
    sums = share_TE.new_zeros(slots, share_TE.shape[1]).index_add(0, slot_T, share_TE)
    sizes = sums.sum(-1)
    within = (_entropy(sums / sizes.clamp_min(1.0)[:, None]) * sizes).sum() / sizes.sum()
    return within - 0.7 * _entropy(share_TE.mean(0))


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp_min(1e-6).log()).sum(-1)

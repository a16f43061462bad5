"""The decoder's kernels in plain torch, for machines without a GPU.

Shapes: T tokens, V vocabulary, H hidden, N query heads, M key/value heads, D head dim, L cached
tokens, P pages, E experts, K top-k.
"""

import itertools

import torch
import torch.nn.functional as F

from fiddler.models.batch import StepBatch
from fiddler.models.kv_cache import LayerKV
from gpu_kernels.host_words import Bell


class TorchKernels:
    """Paged attention by gathering each request's pages, then SDPA."""

    def __init__(
        self, cos_SR: torch.Tensor, sin_SR: torch.Tensor, sm_scale: float, *, eps: float
    ) -> None:
        self._cos_SR = cos_SR
        self._sin_SR = sin_SR
        self._sm_scale = sm_scale
        self._eps = eps

    def embedding(self, tokens_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens_T, table_VH)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        x32_TH = x_TH.float()
        scale_T1 = torch.rsqrt(x32_TH.pow(2).mean(-1, keepdim=True) + self._eps)
        return (x32_TH * scale_T1 * weight_H.float()).to(x_TH.dtype)

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sum_TH = residual_TH + x_TH
        return self.rms_norm(sum_TH, weight_H), sum_TH

    def add_parts(
        self,
        residual_TH: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        shared_TH: torch.Tensor | None,
        weight_H: torch.Tensor,
        late: Bell | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert late is None, "only a device's kernel can wait"
        y_TH = sum(parts[1:], start=parts[0])
        if shared_TH is not None:
            y_TH = y_TH + shared_TH
        return self.add_rms_norm(y_TH.to(residual_TH.dtype), residual_TH, weight_H)

    def norm_route(
        self,
        x_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        norm_H: torch.Tensor,
        router_EH: torch.Tensor,
        top_k: int,
        *,
        renormalise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        y_TH, sum_TH = self.add_rms_norm(x_TH, residual_TH, norm_H)
        return y_TH, sum_TH, *self.route(F.linear(y_TH, router_EH), top_k, renormalise)

    def route(
        self, logits_TE: torch.Tensor, top_k: int, renormalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids ``[T, K]`` and weights of given logits."""
        probs_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
        weights_TK, ids_TK = probs_TE.topk(top_k, dim=-1)
        if renormalise:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return ids_TK, weights_TK

    def linear(
        self, x_TK: torch.Tensor, weight_FK: torch.Tensor, bias_F: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.linear(x_TK, weight_FK, bias_F)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate_TI) * up_TI

    def plan(self, batch: StepBatch) -> None:
        self._batch = batch
        self._cos_T1R = self._cos_SR[batch.positions_T].unsqueeze(1)
        self._sin_T1R = self._sin_SR[batch.positions_T].unsqueeze(1)
        indptr = batch.pages.indptr_B1.tolist()
        self._pages_of = [batch.pages.indices[a:b].long() for a, b in itertools.pairwise(indptr)]

    def attention(
        self,
        q_TND: torch.Tensor,
        k_TMD: torch.Tensor,
        v_TMD: torch.Tensor,
        kv_cache: LayerKV,
        *,
        window: int | None,
        head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        batch = self._batch
        if head_norms is not None:
            q_TND, k_TMD = (
                self.rms_norm(x, norm) for x, norm in zip((q_TND, k_TMD), head_norms, strict=True)
            )
        kv_cache.append(batch.slots_T, self._rotate(k_TMD), v_TMD)
        q_TND = self._rotate(q_TND)
        out_TND = torch.empty_like(q_TND)
        start = 0
        for pages_P, qo_len, kv_len in zip(
            self._pages_of, batch.qo_lens, batch.kv_lens, strict=True
        ):
            rows = slice(start, start + qo_len)
            k_LMD, v_LMD = kv_cache.gather(pages_P, kv_len, q_TND.dtype)
            out_TND[rows] = self._attend(q_TND[rows], k_LMD, v_LMD, window)
            start += qo_len
        return out_TND

    def _attend(
        self,
        q_TND: torch.Tensor,
        k_LMD: torch.Tensor,
        v_LMD: torch.Tensor,
        window: int | None,
    ) -> torch.Tensor:
        q_len, kv_len = q_TND.shape[0], k_LMD.shape[0]
        mask_TL = None if q_len == 1 and window is None else _causal_mask(q_len, kv_len, window)
        out_NTD = F.scaled_dot_product_attention(
            q_TND.transpose(0, 1)[None],
            k_LMD.transpose(0, 1)[None],
            v_LMD.transpose(0, 1)[None],
            attn_mask=mask_TL,
            scale=self._sm_scale,
            enable_gqa=q_TND.shape[1] != k_LMD.shape[1],
        )[0]
        return out_NTD.transpose(0, 1)

    def _rotate(self, x_TND: torch.Tensor) -> torch.Tensor:
        a_TNR, b_TNR = x_TND.float().chunk(2, dim=-1)
        cos, sin = self._cos_T1R, self._sin_T1R
        rotated = torch.cat((a_TNR * cos - b_TNR * sin, b_TNR * cos + a_TNR * sin), dim=-1)
        return rotated.to(x_TND.dtype)


def _causal_mask(q_len: int, kv_len: int, window: int | None) -> torch.Tensor:
    """True where query i (position ``kv_len - q_len + i``) may see key j."""
    position_T1 = torch.arange(kv_len - q_len, kv_len)[:, None]
    key_L = torch.arange(kv_len)[None]
    mask_TL = key_L <= position_T1
    if window is not None:
        mask_TL &= key_L > position_T1 - window
    return mask_TL

"""The decoder's kernels on a CUDA device: Triton, over the same paged cache.

Shapes: T tokens, V vocabulary, H hidden, N query heads, M key/value heads, D head dim, E experts,
K top-k.
"""

from typing import Self

import torch
import torch.nn.functional as F

from fiddler.models.batch import StepBatch
from fiddler.models.kv_cache import LayerKV
from gpu_kernels.attention_decode import DecodePlan, attention_decode, plan_decode
from gpu_kernels.attention_prefill import attention_prefill
from gpu_kernels.attention_variant import Variant
from gpu_kernels.embedding import embedding
from gpu_kernels.few_rows import few_rows_linear, fits_few_rows
from gpu_kernels.hand_over import collect
from gpu_kernels.host_words import Bell
from gpu_kernels.kv_append import rope_and_append
from gpu_kernels.norm_route import MAX_HIDDEN, MAX_TOKENS, RouteWorkspace, norm_route
from gpu_kernels.rmsnorm import add_rms_norm, rms_norm
from gpu_kernels.router import route
from gpu_kernels.silu_mul import silu_mul


class TritonKernels:
    """Decoding rows go through split-KV attention, prompt rows through the ragged kernel.

    Two workspaces are kept from call to call: that of split-KV attention, for the last number of
    decoding requests, and that of routing, whose counters are 0 in between. They serve one stream,
    and a CUDA graph needs kernels of its own, made before it is captured.
    """

    def __init__(
        self,
        cos_SR: torch.Tensor,
        sin_SR: torch.Tensor,
        sm_scale: float,
        *,
        eps: float,
        num_experts: int,
        dtype: torch.dtype,
    ) -> None:
        """``dtype``: of hidden states and of the router."""
        self._cos_SR = cos_SR
        self._sin_SR = sin_SR
        self._sm_scale = sm_scale
        self._eps = eps
        self._num_experts = num_experts
        self._dtype = dtype
        self._route_workspace = RouteWorkspace.make(MAX_TOKENS, num_experts, dtype, cos_SR.device)
        self._decode_plan: DecodePlan | None = None

    def embedding(self, tokens_T: torch.Tensor, table_VH: torch.Tensor) -> torch.Tensor:
        return embedding(tokens_T, table_VH)

    def rms_norm(self, x_TH: torch.Tensor, weight_H: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TH, weight_H, self._eps)

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x_TH, residual_TH, weight_H, self._eps)

    def add_parts(
        self,
        residual_TH: torch.Tensor,
        parts: tuple[torch.Tensor, ...],
        shared_TH: torch.Tensor | None,
        weight_H: torch.Tensor,
        late: Bell | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return collect(residual_TH, parts, shared_TH, weight_H, self._eps, late=late)

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
        """One launch for few tokens."""
        num_tokens, hidden = x_TH.shape
        if num_tokens <= MAX_TOKENS and hidden <= MAX_HIDDEN:
            return norm_route(
                *(x_TH, residual_TH, norm_H, router_EH, top_k, self._eps),
                renormalise=renormalise,
                workspace=self._route_workspace,
            )
        y_TH, sum_TH = self.add_rms_norm(x_TH, residual_TH, norm_H)
        logits_TE = F.linear(y_TH, router_EH)
        return y_TH, sum_TH, *route(logits_TE, top_k, renormalise=renormalise)

    def linear(
        self, x_TK: torch.Tensor, weight_FK: torch.Tensor, bias_F: torch.Tensor | None = None
    ) -> torch.Tensor:
        """By a kernel that reads weights ahead of few tokens; by the matrix library for others."""
        if fits_few_rows(x_TK):
            return few_rows_linear(x_TK, weight_FK, bias_F)
        return F.linear(x_TK, weight_FK, bias_F)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        return silu_mul(gate_up_TF)

    def copy(self) -> Self:
        """The same kernels with workspaces of their own."""
        return type(self)(
            *(self._cos_SR, self._sin_SR, self._sm_scale),
            eps=self._eps,
            num_experts=self._num_experts,
            dtype=self._dtype,
        )

    def plan(self, batch: StepBatch) -> None:
        self._batch = batch
        self._decode_pages = batch.decode_pages()
        self._max_qo_len = max(batch.qo_lens[batch.num_decodes :], default=0)
        if self._max_qo_len:
            self._prefill_pages = batch.prefill_pages()
            # the prefill kernel counts query rows from 0
            self._qo_indptr = batch.qo_indptr_B1[batch.num_decodes :] - batch.num_decodes

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
        batch, split = self._batch, self._batch.num_decodes
        q_norm_D, k_norm_D = head_norms or (None, None)
        q_TND = rope_and_append(
            q_TND,
            k_TMD,
            v_TMD,
            self._cos_SR,
            self._sin_SR,
            batch.positions_T,
            batch.slots_T,
            kv_cache.pages,
            q_norm_D,
            k_norm_D,
            eps=self._eps,
            kv_scales=kv_cache.scales,
        )
        out_TND = torch.empty(q_TND.shape, dtype=q_TND.dtype, device=q_TND.device)
        variant = Variant(window_left=-1 if window is None else window - 1)  # counts without self
        if split:
            attention_decode(
                q_TND[:split],
                kv_cache.pages,
                self._decode_pages,
                self._plan_decode(q_TND[:split], kv_cache.pages),
                sm_scale=self._sm_scale,
                variant=variant,
                kv_scales=kv_cache.scales,
                out=out_TND[:split],
            )
        if self._max_qo_len:
            attention_prefill(
                q_TND[split:],
                kv_cache.pages,
                self._prefill_pages,
                self._qo_indptr,
                sm_scale=self._sm_scale,
                max_qo_len=self._max_qo_len,
                variant=variant,
                kv_scales=kv_cache.scales,
                out=out_TND[split:],
            )
        return out_TND

    def _plan_decode(self, q_BND: torch.Tensor, pages: torch.Tensor) -> DecodePlan:
        """The plan of the layer before, and of the step before, unless the batch has changed."""
        plan = self._decode_plan
        if plan is None or plan.num_units != len(q_BND):
            plan = self._decode_plan = plan_decode(
                len(q_BND),
                q_BND.shape[1],
                pages.shape[3],
                q_BND.shape[2],
                device=q_BND.device,
                dtype=pages.dtype,
            )
        return plan

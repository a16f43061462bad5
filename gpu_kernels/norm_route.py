"""A few tokens' way from attention to their experts in one launch: add, norm, router, choice.

Programs of a token share its experts: each norms the whole row for itself, 4 KB from the L2, and
multiplies it with the router's rows that are its own; the last one to finish chooses. Instead of
four launches that wait for each other, of 3 to 5 us each, where a decode step has nothing else to
do. Shapes: T tokens, H hidden, E experts, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.dependent_launch import dependent, let_next_start, wait_for_last
from gpu_kernels.paged_tile import FLOAT_DTYPES
from gpu_kernels.rmsnorm import add_rms_norm_reference, normed_row
from gpu_kernels.router import MAX_EXPERTS, MAX_TOP_K, best_experts, route_reference
from gpu_kernels.whole_numbers import cdiv, next_power_of_2

MAX_TOKENS = 8  # from there on the matrix library reads the router once for all
MAX_HIDDEN = 8192
TILE = 8192  # weights of the router that a program holds in registers
PROGRAMS = 32  # that share a token's experts, if there are as many


@dataclass(frozen=True, slots=True)
class RouteWorkspace:
    """Scratch of one stream: the logits, and how many of a token's programs are done.

    The counters are 0 between calls: each call leaves them so.
    """

    logits_TE: Tensor
    done_T: Tensor

    @classmethod
    def make(
        cls, num_tokens: int, num_experts: int, dtype: torch.dtype, device: torch.device | str
    ) -> RouteWorkspace:
        """For up to ``num_tokens`` tokens of hidden states of ``dtype``."""
        return cls(
            torch.empty((num_tokens, num_experts), dtype=dtype, device=device),
            torch.zeros(num_tokens, dtype=torch.int32, device=device),
        )

    def check(self, x_TH: Tensor, num_experts: int) -> None:
        """Assert that a call fits."""
        logits, done = self.logits_TE, self.done_T
        assert logits.shape[0] >= len(x_TH) and logits.shape[1] == num_experts
        assert logits.dtype == x_TH.dtype and logits.is_contiguous()
        assert len(done) >= len(x_TH) and done.dtype == torch.int32
        assert logits.device == done.device == x_TH.device


def norm_route(
    x_TH: Tensor,
    residual_TH: Tensor,
    norm_H: Tensor,
    router_EH: Tensor,
    top_k: int,
    eps: float,
    *,
    renormalise: bool = True,
    workspace: RouteWorkspace | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``(rms_norm(sum), sum, ids, weights)``: ``add_rms_norm``, then ``route`` (softmax).

    ``sum = x + residual`` and the norm are rounded to x's dtype, ``[T, H]``, as the logits are. ids
    int32 and weights float32 ``[T, K]``, likeliest first. T is MAX_TOKENS at most. The router and
    ``norm_H`` must not have been written by the last kernel before this one. Safe in a CUDA graph;
    one workspace per stream.
    """
    (num_tokens, hidden), num_experts = x_TH.shape, len(router_EH)
    assert x_TH.dtype in FLOAT_DTYPES and x_TH.stride(1) == residual_TH.stride(1) == 1
    assert residual_TH.shape == x_TH.shape and residual_TH.dtype == x_TH.dtype
    assert num_tokens <= MAX_TOKENS and hidden <= MAX_HIDDEN
    assert norm_H.shape == (hidden,) and norm_H.is_contiguous()
    assert router_EH.shape == (num_experts, hidden) and router_EH.is_contiguous()
    assert router_EH.dtype == x_TH.dtype
    assert 1 <= top_k <= min(MAX_TOP_K, num_experts) and num_experts <= MAX_EXPERTS
    device, dtype = x_TH.device, x_TH.dtype
    assert {t.device for t in (residual_TH, norm_H, router_EH)} == {device}
    if workspace is None:
        workspace = RouteWorkspace.make(num_tokens, num_experts, dtype, device)
    workspace.check(x_TH, num_experts)
    normed_TH = torch.empty((num_tokens, hidden), dtype=dtype, device=device)
    sum_TH = torch.empty_like(normed_TH)
    ids_TK = torch.empty((num_tokens, top_k), dtype=torch.int32, device=device)
    weights_TK = torch.empty((num_tokens, top_k), dtype=torch.float32, device=device)
    if num_tokens == 0:
        return normed_TH, sum_TH, ids_TK, weights_TK
    block_h = next_power_of_2(hidden)
    block_e = min(TILE // block_h, next_power_of_2(cdiv(num_experts, PROGRAMS)))
    _norm_route_kernel[(cdiv(num_experts, block_e), num_tokens)](
        x_TH,
        residual_TH,
        norm_H,
        router_EH,
        workspace.logits_TE,
        workspace.done_T,
        normed_TH,
        sum_TH,
        ids_TK,
        weights_TK,
        x_TH.stride(0),
        residual_TH.stride(0),
        hidden,
        num_experts,
        eps,
        TOP_K=top_k,
        BLOCK_H=block_h,
        BLOCK_E=block_e,
        BLOCK_P=next_power_of_2(num_experts),
        BLOCK_K=next_power_of_2(top_k),
        RENORMALISE=renormalise,
        **dependent(device),
        num_warps=4,
    )
    return normed_TH, sum_TH, ids_TK, weights_TK


def norm_route_reference(
    x_TH: Tensor,
    residual_TH: Tensor,
    norm_H: Tensor,
    router_EH: Tensor,
    top_k: int,
    eps: float,
    *,
    renormalise: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in plain torch: the norm and the logits in float32, the sum in x's dtype."""
    normed_TH, sum_TH = add_rms_norm_reference(x_TH, residual_TH, norm_H, eps)
    logits_TE = normed_TH.to(x_TH.dtype).float() @ router_EH.float().T
    ids_TK, weights_TK = route_reference(logits_TE, top_k, renormalise=renormalise)
    return normed_TH, sum_TH, ids_TK, weights_TK


@triton.jit
def _norm_route_kernel(
    x_ptr,
    residual_ptr,
    norm_ptr,
    router_ptr,
    logits_ptr,
    done_ptr,
    normed_ptr,
    sum_ptr,
    ids_ptr,
    weights_ptr,
    stride_x,
    stride_residual,
    hidden,
    num_experts,
    eps,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    let_next_start(DEPENDENT)
    tile = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    mask_H = h_H < hidden
    e_E = tile * BLOCK_E + tl.arange(0, BLOCK_E)
    is_expert_E = e_E < num_experts
    # asked for before anything else: it is all that comes from memory
    w_EH = tl.load(
        router_ptr + e_E[:, None] * hidden + h_H[None, :],
        mask=is_expert_E[:, None] & mask_H[None, :],
        other=0.0,
    )
    norm_H = tl.load(norm_ptr + h_H, mask=mask_H, other=0.0).to(tl.float32)
    wait_for_last(DEPENDENT)
    x_H = tl.load(x_ptr + token * stride_x + h_H, mask=mask_H, other=0.0).to(tl.float32)
    x_H += tl.load(residual_ptr + token * stride_residual + h_H, mask=mask_H, other=0.0)
    sum_H = x_H.to(sum_ptr.dtype.element_ty)
    x_H = sum_H.to(tl.float32)  # later layers see the rounded sum: norm the same values
    normed_H = normed_row(x_H, norm_H, hidden, eps).to(normed_ptr.dtype.element_ty)
    tl.store(sum_ptr + token * hidden + h_H, sum_H, mask=mask_H & (tile == 0))
    tl.store(normed_ptr + token * hidden + h_H, normed_H, mask=mask_H & (tile == 0))
    logit_E = tl.sum(w_EH.to(tl.float32) * normed_H.to(tl.float32)[None, :], 1)
    tl.store(logits_ptr + token * num_experts + e_E, logit_E, mask=is_expert_E)

    # every thread's logits are written before one thread says so; whoever is last sees all
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(done_ptr + token, 0)
        e_1P = tl.arange(0, BLOCK_P)[None, :]
        mask_1P = e_1P < num_experts
        logits_1P = tl.load(
            logits_ptr + token * num_experts + e_1P, mask=mask_1P, other=float("-inf")
        )
        ids_K, weights_K = best_experts(
            *(logits_1P.to(tl.float32), None, e_1P, mask_1P, 1, 1, TOP_K, BLOCK_K),
            *(False, RENORMALISE),
        )
        k_K = tl.arange(0, BLOCK_K)
        tl.store(ids_ptr + token * TOP_K + k_K, ids_K, mask=k_K < TOP_K)
        tl.store(weights_ptr + token * TOP_K + k_K, weights_K, mask=k_K < TOP_K)

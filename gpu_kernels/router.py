"""From a router's logits to each token's experts and their weights.

One program per token, float32 inside. Shapes: T tokens, E experts, K experts per token, G groups
of experts, P experts per group.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.device import family
from gpu_kernels.order_key import LOWEST, pack, packed_index, packed_value
from gpu_kernels.paged_tile import FLOAT_DTYPES
from gpu_kernels.tuned import choose
from gpu_kernels.whole_numbers import next_power_of_2

Scoring = Literal["softmax", "sigmoid"]

MAX_EXPERTS, MAX_TOP_K = 512, 16
TINY = tl.constexpr(1e-20)  # keeps the sum of vanished sigmoids from being a divisor of 0


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    bias_E: Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    copy_to: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids ``[T, K]`` int32, likeliest first, and weights ``[T, K]`` float32.

    Scores are the float32 softmax over all experts, or sigmoids. ``bias_E`` (float32) is added for
    choosing only. With groups, the experts come from the ``top_groups`` best of ``num_groups``
    consecutive groups; a group counts as its best expert, or as the sum of its best two if there is
    a bias (DeepSeek-V2 and V3). Weights are the chosen scores, divided by their sum if
    ``renormalise``, times ``scale``.

    Equal scores are won by the lower id, which ``torch.topk`` does not promise. NaN counts as the
    largest score: it makes NaN weights, and ids stay in range. ``copy_to`` gets the same ids and
    weights, for example in pinned host memory.
    """
    num_tokens, num_experts = logits_TE.shape
    out = _new_out(logits_TE, top_k) if out is None else out
    assert logits_TE.dtype in FLOAT_DTYPES and logits_TE.stride(1) == 1
    assert scoring in ("softmax", "sigmoid") and 1 <= num_experts <= MAX_EXPERTS
    assert num_groups >= 1 and num_experts % num_groups == 0 and 1 <= top_groups <= num_groups
    group_size = num_experts // num_groups
    assert 1 <= top_k <= min(MAX_TOP_K, top_groups * group_size)
    if bias_E is not None:
        assert bias_E.shape == (num_experts,) and bias_E.dtype == torch.float32
        assert bias_E.is_contiguous() and bias_E.device == logits_TE.device
        assert group_size >= 2 or num_groups == top_groups, "a group counts as its best two"
    for ids_TK, weights_TK in (out, copy_to or out):
        assert ids_TK.dtype == torch.int32 and weights_TK.dtype == torch.float32
        assert ids_TK.shape == weights_TK.shape == (num_tokens, top_k)
        assert ids_TK.is_contiguous() and weights_TK.is_contiguous()
    assert out[0].device == out[1].device == logits_TE.device
    if num_tokens == 0:
        return out
    _route_kernel[(num_tokens,)](
        logits_TE,
        bias_E,
        *out,
        *(copy_to or (None, None)),
        logits_TE.stride(0),
        scale,
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        TOP_GROUPS=top_groups,
        TOP_K=top_k,
        BLOCK_G=next_power_of_2(num_groups),
        BLOCK_P=next_power_of_2(group_size),
        BLOCK_K=next_power_of_2(top_k),
        IS_SIGMOID=scoring == "sigmoid",
        RENORMALISE=renormalise,
        HAS_COPY=copy_to is not None,
        **choose("router", family(logits_TE.device), tokens=num_tokens, experts=num_experts),
    )
    return out


def route_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    bias_E: Tensor | None = None,
    renormalise: bool = True,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: int64 ids and float32 weights."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if top_groups < num_groups:
        choice_TGP = choice_TE.unflatten(-1, (num_groups, -1))
        counted = 1 if bias_E is None else 2
        group_TG = choice_TGP.sort(descending=True).values[..., :counted].sum(-1)
        dropped = group_TG.argsort(descending=True, stable=True)[:, top_groups:, None]
        choice_TGP = choice_TGP.scatter(1, dropped.expand(-1, -1, choice_TGP.shape[2]), -torch.inf)
        choice_TE = choice_TGP.flatten(1)
    ids_TK = choice_TE.argsort(descending=True, stable=True)[:, :top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + TINY.value)
    return ids_TK, weights_TK * scale


def _new_out(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (logits_TE.shape[0], top_k)
    return (
        logits_TE.new_empty(shape, dtype=torch.int32),
        logits_TE.new_empty(shape, dtype=torch.float32),
    )


@triton.jit
def _scores(x_GP, IS_SIGMOID: tl.constexpr):
    if IS_SIGMOID:
        decay_GP = tl.exp(-tl.abs(x_GP))  # never overflows: sigmoid from the small side
        return tl.where(x_GP >= 0.0, 1.0, decay_GP) / (1.0 + decay_GP)
    else:
        largest = tl.max(tl.max(x_GP, 1), 0)  # -inf if all are NaN
        power_GP = tl.exp(x_GP - tl.where(largest == float("-inf"), 0.0, largest))
        return power_GP / tl.sum(tl.sum(power_GP, 1), 0)


@triton.jit
def _keep_best_groups(
    packed_GP, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SUM_OF_TWO: tl.constexpr
):
    g_G = tl.arange(0, packed_GP.shape[0])
    best_G = tl.max(packed_GP, 1)
    value_G = packed_value(best_G)
    if SUM_OF_TWO:
        value_G += packed_value(
            tl.max(tl.where(packed_GP == best_G[:, None], LOWEST, packed_GP), 1)
        )
    group_G = tl.where(g_G < NUM_GROUPS, pack(value_G, g_G), LOWEST)
    is_kept_G = g_G < 0
    for _ in range(TOP_GROUPS):
        best = tl.max(group_G, 0)
        is_kept_G = is_kept_G | (group_G == best)
        group_G = tl.where(group_G == best, LOWEST, group_G)
    return tl.where(is_kept_G[:, None], packed_GP, LOWEST)


@triton.jit
def best_experts(
    x_GP,
    bias_ptr,
    e_GP,
    mask_GP,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
):
    """Ids and weights of the experts that logits choose, ``[BLOCK_K]`` each, 0 beyond TOP_K.

    Logits are -inf and ids of no matter outside the mask.
    """
    score_GP = _scores(x_GP, IS_SIGMOID)
    choice_GP = score_GP
    if bias_ptr is not None:
        choice_GP += tl.load(bias_ptr + e_GP, mask=mask_GP, other=0.0)
    packed_GP = tl.where(mask_GP, pack(choice_GP, e_GP), LOWEST)
    if TOP_GROUPS < NUM_GROUPS:
        packed_GP = _keep_best_groups(packed_GP, NUM_GROUPS, TOP_GROUPS, bias_ptr is not None)
    k_K = tl.arange(0, BLOCK_K)
    ids_K = tl.zeros([BLOCK_K], tl.int32)
    weights_K = tl.zeros([BLOCK_K], tl.float32)
    for k in range(TOP_K):
        best = tl.max(tl.max(packed_GP, 1), 0)
        weight = tl.sum(tl.sum(tl.where(packed_GP == best, score_GP, 0.0), 1), 0)
        ids_K = tl.where(k_K == k, packed_index(best), ids_K)
        weights_K = tl.where(k_K == k, weight, weights_K)
        packed_GP = tl.where(packed_GP == best, LOWEST, packed_GP)
    if RENORMALISE:
        weights_K = weights_K / (tl.sum(weights_K, 0) + TINY)
    return ids_K, weights_K


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    copy_ids_ptr,
    copy_weights_ptr,
    stride_logits,
    scale,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    HAS_COPY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    g_G = tl.arange(0, BLOCK_G)
    p_P = tl.arange(0, BLOCK_P)
    e_GP = g_G[:, None] * GROUP_SIZE + p_P[None, :]
    mask_GP = (g_G < NUM_GROUPS)[:, None] & (p_P < GROUP_SIZE)[None, :]
    x_ptr = logits_ptr + token * stride_logits
    x_GP = tl.load(x_ptr + e_GP, mask=mask_GP, other=float("-inf")).to(tl.float32)
    ids_K, weights_K = best_experts(
        *(x_GP, bias_ptr, e_GP, mask_GP, NUM_GROUPS, TOP_GROUPS, TOP_K, BLOCK_K),
        *(IS_SIGMOID, RENORMALISE),
    )
    weights_K *= scale

    k_K = tl.arange(0, BLOCK_K)
    target_K = token * TOP_K + k_K
    tl.store(ids_ptr + target_K, ids_K, mask=k_K < TOP_K)
    tl.store(weights_ptr + target_K, weights_K, mask=k_K < TOP_K)
    if HAS_COPY:
        tl.store(copy_ids_ptr + target_K, ids_K, mask=k_K < TOP_K)
        tl.store(copy_weights_ptr + target_K, weights_K, mask=k_K < TOP_K)

"""Both ends of handing a layer's cold experts to the CPU: publish what it needs, collect its part.

``publish`` writes into mapped host memory, which a kernel reaches like its own; ``collect`` reads
the CPU's part from there, adds up and norms. Rows from the number in use on are padding: they are
no expert's and nobody reads them. Of the cold experts' rows the device may pull the last ones, that
is, read them from host memory by itself; which depends on nothing but what the step chose.

Order of the sums in ``collect``, each float32 and none fused with a product: the parts as given,
then the shared expert's; that sum is rounded to the activations' type, the residual is added and
the result rounded again. The same kernel serves who has one part, so the ways to run a layer
differ by nothing but where the parts lie.

Shapes: T tokens (rows), K choices of a token, E experts, H hidden, N counts of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_kernels.cold_rows import cold_experts, first_rows, piece_of
from gpu_kernels.paged_tile import FLOAT_DTYPES

MAX_TOP_K = 16
MAX_PARTS = 3
BLOCK_H = 1024  # of a program of publish: two write a token of 2,048


@dataclass(frozen=True, slots=True)
class ColdWork:
    """What the CPU reads, in mapped host memory: its expert ids (-1: not its own) and inputs.

    ``bell``: a word there that shall be 0 when these are; None: there is none.
    """

    x_TH: Tensor  # float32
    ids_TK: Tensor  # int32
    weights_TK: Tensor  # float32
    bell: Tensor | None = None  # int64 [1]


@dataclass(frozen=True, slots=True)
class Pulls:
    """What the device pulls: of n distinct cold experts end to end, the rows from ``kept_N[n]`` on.

    They lie in the order of ``place_E``, each of ``width`` rows. ``publish`` writes the cold
    choices to ``ids_TK``, -1 elsewhere, and each one's first row to pull to ``first_TK``. All int32
    on the device.
    """

    kept_N: Tensor  # for every n that a step may have
    place_E: Tensor
    width: int
    ids_TK: Tensor
    first_TK: Tensor


def publish(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    slot_E: Tensor,
    num_used: Tensor,
    record_TK: Tensor,
    cold: ColdWork | None,
    *,
    pulls: Pulls | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``ids_TK`` with -1 for padding rows, for the device's own experts.

    ``ids_TK`` int32 in ``slot_E`` (int32; below 0: not on the device), ``num_used`` int32 ``[1]``
    on the device. ``record_TK`` (int32) gets the ids too. ``cold`` gets x as
    float32, the weights, and the ids with -1 for padding and for experts on the device; None: no
    expert of the layer is elsewhere. ``pulls`` gets the same ids, and rows. Safe in a CUDA graph.
    """
    num_tokens, hidden = x_TH.shape
    top_k = ids_TK.shape[1]
    out = torch.empty_like(ids_TK) if out is None else out
    assert x_TH.dtype in FLOAT_DTYPES and x_TH.stride(1) == 1 and 1 <= top_k <= MAX_TOP_K
    theirs = () if cold is None else (cold.ids_TK,)
    theirs = theirs if pulls is None else (*theirs, pulls.ids_TK, pulls.first_TK)
    for ids in (ids_TK, record_TK, out, *theirs):
        assert ids.shape == (num_tokens, top_k) and ids.dtype == torch.int32 and ids.is_contiguous()
    assert weights_TK.shape == ids_TK.shape and weights_TK.dtype == torch.float32
    assert weights_TK.is_contiguous()
    assert slot_E.ndim == 1 and slot_E.dtype == torch.int32 and slot_E.is_contiguous()
    assert num_used.shape == (1,) and num_used.dtype == torch.int32
    assert {t.device for t in (ids_TK, weights_TK, slot_E, num_used, out)} == {x_TH.device}
    if cold is not None:
        assert cold.x_TH.shape == x_TH.shape and cold.weights_TK.shape == ids_TK.shape
        assert cold.x_TH.dtype == cold.weights_TK.dtype == torch.float32
        assert cold.x_TH.is_contiguous() and cold.weights_TK.is_contiguous()
        assert cold.bell is None or (cold.bell.shape, cold.bell.dtype) == ((1,), torch.int64)
    if pulls is not None:
        assert cold is not None and pulls.width > 0
        for table in (pulls.kept_N, pulls.place_E):
            assert table.dtype == torch.int32 and table.is_contiguous()
        assert pulls.kept_N.numel() > min(ids_TK.numel(), slot_E.numel())
        assert pulls.place_E.shape == slot_E.shape
        ours = (pulls.kept_N, pulls.place_E, pulls.ids_TK, pulls.first_TK)
        assert {table.device for table in ours} == {x_TH.device}
    if num_tokens == 0:
        return out
    num_blocks = 1 if cold is None else triton.cdiv(hidden, BLOCK_H)
    _publish_kernel[(num_tokens, num_blocks)](
        x_TH,
        ids_TK,
        weights_TK,
        slot_E,
        num_used,
        record_TK,
        *((None,) * 4 if cold is None else (cold.x_TH, cold.ids_TK, cold.weights_TK, cold.bell)),
        *(
            (None,) * 4
            if pulls is None
            else (pulls.kept_N, pulls.place_E, pulls.ids_TK, pulls.first_TK)
        ),
        out,
        x_TH.stride(0),
        hidden,
        slot_E.numel(),
        0 if pulls is None else pulls.width,
        TOP_K=top_k,
        BLOCK_H=BLOCK_H,
        BLOCK_K=triton.next_power_of_2(top_k),
        HAS_COLD=cold is not None,
        **piece_of(slot_E.numel()),
        num_warps=4,
    )
    return out


def publish_reference(ids_TK: Tensor, slot_E: Tensor, num_used: int) -> tuple[Tensor, Tensor]:
    """The ids that ``publish`` records and returns, and the cold ones."""
    used_TK = ids_TK.clone()
    used_TK[num_used:] = -1
    is_here_TK = slot_E[ids_TK.long()] >= 0
    return used_TK, used_TK.masked_fill(is_here_TK, -1)


def collect(
    residual_TH: Tensor,
    parts: tuple[Tensor, ...],
    shared_TH: Tensor | None,
    norm_H: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return ``(rms_norm(sum), sum)``, sum = residual + parts + shared expert's, in x's dtype.

    ``parts``: one to three float32 ``[T, H]``, on the device or in mapped host memory; see above
    for the order. Safe in a CUDA graph.
    """
    num_tokens, hidden = residual_TH.shape
    assert 1 <= len(parts) <= MAX_PARTS
    for part_TH in parts:
        assert part_TH.shape == residual_TH.shape and part_TH.dtype == torch.float32
        assert part_TH.stride(1) == 1
    assert residual_TH.dtype in FLOAT_DTYPES and residual_TH.stride(1) == 1
    if shared_TH is not None:
        assert shared_TH.shape == residual_TH.shape and shared_TH.dtype == residual_TH.dtype
        assert shared_TH.stride(1) == 1 and shared_TH.device == residual_TH.device
    assert norm_H.shape == (hidden,) and norm_H.is_contiguous()
    assert norm_H.device == residual_TH.device
    normed_TH = torch.empty(residual_TH.shape, dtype=residual_TH.dtype, device=residual_TH.device)
    sum_TH = torch.empty_like(normed_TH)
    if num_tokens == 0:
        return normed_TH, sum_TH
    second_TH, third_TH = (*parts[1:], None, None)[:2]
    block = triton.next_power_of_2(hidden)
    _collect_kernel[(num_tokens,)](
        residual_TH,
        parts[0],
        second_TH,
        third_TH,
        shared_TH,
        norm_H,
        normed_TH,
        sum_TH,
        residual_TH.stride(0),
        parts[0].stride(0),
        0 if second_TH is None else second_TH.stride(0),
        0 if third_TH is None else third_TH.stride(0),
        0 if shared_TH is None else shared_TH.stride(0),
        hidden,
        eps,
        BLOCK_H=block,
        HAS_SECOND=second_TH is not None,
        HAS_THIRD=third_TH is not None,
        HAS_SHARED=shared_TH is not None,
        num_warps=min(max(block // 512, 1), 16),
    )
    return normed_TH, sum_TH


def collect_reference(
    residual_TH: Tensor,
    parts: tuple[Tensor, ...],
    shared_TH: Tensor | None,
    norm_H: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch: the norm in float32, the sum in the residual's dtype."""
    device, dtype = residual_TH.device, residual_TH.dtype
    sum_TH = parts[0].to(device)
    for part_TH in parts[1:]:
        sum_TH = sum_TH + part_TH.to(device)
    if shared_TH is not None:
        sum_TH = sum_TH + shared_TH.float()
    sum_TH = residual_TH + sum_TH.to(dtype)
    x_TH = sum_TH.float()
    scale_T1 = torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + eps)
    return x_TH * scale_T1 * norm_H.float(), sum_TH


@triton.jit
def _publish_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    slot_ptr,
    used_ptr,
    record_ptr,
    cold_x_ptr,
    cold_ids_ptr,
    cold_weights_ptr,
    bell_ptr,
    kept_ptr,
    place_ptr,
    pulled_ptr,
    first_ptr,
    out_ptr,
    stride_x,
    hidden,
    num_experts,
    width,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_COLD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_used = tl.load(used_ptr)
    is_used = token < num_used
    if HAS_COLD:
        h_H = block * BLOCK_H + tl.arange(0, BLOCK_H)
        mask_H = (h_H < hidden) & is_used
        x_H = tl.load(x_ptr + token * stride_x + h_H, mask=mask_H, other=0.0)
        tl.store(cold_x_ptr + token * hidden + h_H, x_H.to(tl.float32), mask=mask_H)
    if block == 0:
        k_K = tl.arange(0, BLOCK_K)
        is_choice_K = k_K < TOP_K
        at_K = token * TOP_K + k_K
        ids_K = tl.load(ids_ptr + at_K, mask=is_choice_K & is_used, other=-1)
        tl.store(out_ptr + at_K, ids_K, mask=is_choice_K)
        tl.store(record_ptr + at_K, ids_K, mask=is_choice_K)
        if HAS_COLD:
            slot_K = tl.load(slot_ptr + ids_K, mask=ids_K >= 0, other=-1)
            weights_K = tl.load(weights_ptr + at_K, mask=is_choice_K, other=0.0)
            cold_K = tl.where(slot_K >= 0, -1, ids_K)
            tl.store(cold_ids_ptr + at_K, cold_K, mask=is_choice_K)
            tl.store(cold_weights_ptr + at_K, weights_K, mask=is_choice_K)
            if bell_ptr is not None:
                tl.store(bell_ptr, 0)
            if pulled_ptr is not None:
                tl.store(pulled_ptr + at_K, cold_K, mask=is_choice_K)
                num_pairs = tl.minimum(num_used, tl.num_programs(0)) * TOP_K
                is_cold_E = cold_experts(
                    ids_ptr, slot_ptr, num_pairs, num_experts, BLOCK_E, BLOCK_P
                )
                first_K = first_rows(
                    is_cold_E, cold_K, place_ptr, kept_ptr, width, num_experts, BLOCK_E
                )
                tl.store(first_ptr + at_K, first_K, mask=is_choice_K)


@triton.jit
def _collect_kernel(
    residual_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    shared_ptr,
    norm_ptr,
    normed_ptr,
    sum_ptr,
    stride_residual,
    stride_first,
    stride_second,
    stride_third,
    stride_shared,
    hidden,
    eps,
    BLOCK_H: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_THIRD: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    mask_H = h_H < hidden
    y_H = tl.load(first_ptr + token * stride_first + h_H, mask=mask_H, other=0.0)
    if HAS_SECOND:
        y_H += tl.load(second_ptr + token * stride_second + h_H, mask=mask_H, other=0.0)
    if HAS_THIRD:
        y_H += tl.load(third_ptr + token * stride_third + h_H, mask=mask_H, other=0.0)
    if HAS_SHARED:
        shared_H = tl.load(shared_ptr + token * stride_shared + h_H, mask=mask_H, other=0.0)
        y_H += shared_H.to(tl.float32)
    dtype: tl.constexpr = sum_ptr.dtype.element_ty
    residual_H = tl.load(residual_ptr + token * stride_residual + h_H, mask=mask_H, other=0.0)
    sum_H = (residual_H.to(tl.float32) + y_H.to(dtype).to(tl.float32)).to(dtype)
    tl.store(sum_ptr + token * hidden + h_H, sum_H, mask=mask_H)
    x_H = sum_H.to(tl.float32)  # later layers see the rounded sum: norm the same values
    scale = 1.0 / tl.sqrt(tl.sum(x_H * x_H, 0) / hidden + eps)
    norm_H = tl.load(norm_ptr + h_H, mask=mask_H, other=0.0).to(tl.float32)
    tl.store(normed_ptr + token * hidden + h_H, (x_H * scale * norm_H).to(dtype), mask=mask_H)

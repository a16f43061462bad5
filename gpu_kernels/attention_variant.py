"""What may stand between q k^T and the softmax, and what the kernels are told of it.

Shapes: H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
IN_KERNEL_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Ways in which models' attention differs; the default is plain softmax attention.

    ``window_left`` keeps that many earlier tokens and the token itself; -1 keeps all.
    ``logits_soft_cap`` c makes a scaled logit c * tanh(logit / c); 0: none (Gemma 2). ``sinks_H``,
    float32 [H], are logits of one more key per head, which has no value (gpt-oss).
    ``alibi_slopes_H``, float32 [H], add slope * (key position - query position), not together with
    a cap (Press et al. 2022).
    """

    window_left: int = -1
    logits_soft_cap: float = 0.0
    sinks_H: Tensor | None = None
    alibi_slopes_H: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.window_left >= -1 and self.logits_soft_cap >= 0.0
        assert self.alibi_slopes_H is None or self.logits_soft_cap == 0.0, "ALiBi without a cap"


PLAIN = Variant()


def logits_args(
    variant: Variant, num_heads: int, sm_scale: float, device: torch.device
) -> dict[str, Any]:
    """Arguments by name of both kernels that make logits; asserts that the tensors fit."""
    for per_head in (variant.sinks_H, variant.alibi_slopes_H):
        if per_head is not None:
            assert per_head.shape == (num_heads,) and per_head.is_contiguous()
            assert per_head.dtype == torch.float32 and per_head.device == device
    cap = variant.logits_soft_cap
    return {
        # tanh(x) = 1 - 2 / (2 ** (2 x log2(e)) + 1): the factor before, and the one after it
        "scale_log2": LOG2_E * (2 * sm_scale / cap if cap else sm_scale),
        "cap_log2": LOG2_E * cap,
        "slopes_ptr": variant.alibi_slopes_H,
        "HAS_CAP": cap > 0.0,
        "HAS_ALIBI": variant.alibi_slopes_H is not None,
    }

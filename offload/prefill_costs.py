"""What a cold expert costs on either side in a step of many tokens, measured once per start."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts
from cpu_kernels.kernel_paths import Activations
from cpu_kernels.times import measure_times
from offload.units import MIB

# Four points and the straight lines through them; the slow way with 256 tokens of a Mixtral expert
# alone takes 0.14 s.
TOKENS = (1, 8, 32, 128, 256)
BUDGET_S = 1.0
# Small experts are measured some at a time, as they come: the first of a layer costs more.
CALL_BYTES = 96 * MIB
MOST_ROUTED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCosts:
    """``copy_s``: seconds of the link per expert. ``expert_s(tokens)``: of the CPU.

    ``hand_over``: from how many tokens on the CPU leaves an expert to the matrix library.
    """

    copy_s: float
    expert_s: Callable[[int], float]
    hand_over: int | None


def measure_costs(
    pool: ExpertPool, experts: Experts, activations: Activations, *, copy_s: float
) -> PrefillCosts:
    """Time ``experts``, one layer's, on the CPU; takes about a second. The pool must be idle."""
    expert_bytes = experts.w13_stride + experts.w2_stride
    routed = max(1, min(MOST_ROUTED, CALL_BYTES // expert_bytes))
    table = measure_times(
        pool, experts, activations, tokens=TOKENS, routed=routed, budget_s=BUDGET_S
    )
    # float32 products stay with the exact kernels, whose sums do not depend on the machine
    if activations == "f32":
        return PrefillCosts(copy_s=copy_s, expert_s=table.time, hand_over=None)
    return PrefillCosts(copy_s=copy_s, expert_s=table.best, hand_over=table.switch_over())


def prefill_activations(dtype: torch.dtype, expert_dtype: torch.dtype) -> Activations:
    """What the CPU rounds hidden states to for many tokens: bf16 where the device does so too."""
    return "bf16" if dtype == expert_dtype == torch.bfloat16 else "f32"

"""Random expert layers for the tests of the CPU kernels, and their comparison with float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.expert_mlp import ExpertPool
from cpu_kernels.expert_reference import expert_mlp_reference, f32_to_bf16

DTYPES = ("bf16", "f32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Inputs of one submit: weights, hidden states and pairs."""

    w13_EFH: npt.NDArray[Any]
    w2_EHI: npt.NDArray[Any]
    x_TH: npt.NDArray[np.float32]
    expert_P: npt.NDArray[Any]
    token_P: npt.NDArray[Any]
    weight_P: npt.NDArray[np.float32]

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        pairs = (self.expert_P, self.token_P, self.weight_P)
        return (self.w13_EFH, self.w2_EHI, self.x_TH, *pairs)


def random_layer(
    rng: np.random.Generator,
    *,
    num_experts: int,
    hidden: int,
    width: int,
    num_tokens: int,
    num_pairs: int,
    dtype: str,
    index_type: type[np.int32] | type[np.int64] = np.int64,
) -> Layer:
    """A layer of normal numbers with uniformly random pairs, repeated ones included."""
    w13_EFH = normal(rng, (num_experts, 2 * width, hidden)) / np.float32(np.sqrt(hidden))
    w2_EHI = normal(rng, (num_experts, hidden, width)) / np.float32(np.sqrt(width))
    if dtype == "bf16":
        w13_EFH, w2_EHI = f32_to_bf16(w13_EFH), f32_to_bf16(w2_EHI)
    return Layer(
        w13_EFH=w13_EFH,
        w2_EHI=w2_EHI,
        x_TH=normal(rng, (num_tokens, hidden)),
        expert_P=rng.integers(0, num_experts, num_pairs, index_type),
        token_P=rng.integers(0, num_tokens, num_pairs, index_type),
        weight_P=rng.random(num_pairs, np.float32),
    )


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    return rng.standard_normal(shape, np.float32)


def run_layer(pool: ExpertPool, layer: Layer) -> npt.NDArray[np.float32]:
    """The pool's answer, in a buffer that held NaN before."""
    out_TH = np.full_like(layer.x_TH, np.nan)
    pool.submit(*layer.arrays(), out_TH)
    pool.wait()
    return out_TH


def relative_error(out_TH: npt.NDArray[np.float32], layer: Layer) -> float:
    """Largest error of ``out_TH``, in units of the largest reference value."""
    expected_TH = expert_mlp_reference(*layer.arrays())
    worst = float(np.abs(out_TH - expected_TH).max(initial=0))
    scale = float(np.abs(expected_TH).max(initial=0))
    return worst / scale if scale > 0 else worst

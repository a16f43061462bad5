"""Random expert layers for the tests of the CPU kernels, and their comparison with float64.

T tokens, S choices of a token, E experts, H hidden, I width, F = 2I, N rows, K columns, G groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_kernels.bf16 import U16, bf16_to_f32, f32_to_bf16
from cpu_kernels.expert_layer import ExpertLayer
from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import Experts, Mlp, dense_experts, packed_experts
from cpu_kernels.kernel_paths import PATHS, KernelPath
from cpu_kernels.lossless import pack_lossless
from cpu_kernels.packed_layout import (
    PackedShape,
    Quantised,
    decode_scales,
    dequantise,
    encode_scales,
    pack_expert,
)
from cpu_kernels.packed_reference import dense_layer_reference, packed_layer_reference
from cpu_kernels.weight_kind import BF12, WeightKind

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Rng = np.random.Generator

DENSE_PATHS = ("f32/f32", "bf16/f32", "bf16/bf16")
# A path compiles for some seconds. These hold every pair of two of: codes, group, zero points,
# type of the scales, activations.
PACKED_PATHS = (
    *("w4g32z/int8", "w8g64/int8", "w8g128z-bf16/int8"),
    *("w8g32-bf16/f32", "w4g64z-bf16/f32", "w4g128/f32"),
)
LOSSLESS_PATHS = ("bf12/f32", "bf12/bf16")
TESTED_PATHS = DENSE_PATHS + PACKED_PATHS + LOSSLESS_PATHS
EXACT_PATHS = tuple(name for name in TESTED_PATHS if name.endswith("/f32"))
ROUNDED_PATHS = tuple(name for name in TESTED_PATHS if not name.endswith("/f32"))
# One of each stage's source and each way to round: for what does not depend on the kind.
FEW_PATHS = ("bf16/f32", "bf16/bf16", "w4g64z-bf16/f32", "w4g32z/int8", "bf12/f32")

BY_NAME = {path.name: path for path in PATHS}
# The matrices are scaled so that outputs are about so large, times the root of a token's choices.
TYPICAL_OUT = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A layer's experts as the kernels take them, and the same in float64."""

    path: KernelPath
    experts: Experts
    w13_EFH: F64
    w2_EHI: F64


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a submit brings."""

    x_TH: F32
    ids_TS: npt.NDArray[np.int32]
    weights_TS: F32

    def arrays(self) -> tuple[Any, ...]:
        return self.x_TH, self.ids_TS, self.weights_TS

    def tokens(self, chosen: Any) -> "Step":
        """The step of these tokens alone."""
        return Step(
            x_TH=np.ascontiguousarray(self.x_TH[chosen]),
            ids_TS=np.ascontiguousarray(self.ids_TS[chosen]),
            weights_TS=np.ascontiguousarray(self.weights_TS[chosen]),
        )


def normal(rng: Rng, *shape: int) -> F32:
    return rng.standard_normal(shape, np.float32)


def random_step(
    rng: Rng, *, num_tokens: int, hidden: int, num_experts: int, top_k: int = 2
) -> Step:
    """Normal x; ids are random, some -1, some twice in a token."""
    return Step(
        x_TH=normal(rng, num_tokens, hidden),
        ids_TS=rng.integers(-1, num_experts, (num_tokens, top_k), np.int32),
        weights_TS=rng.random((num_tokens, top_k), np.float32),
    )


def random_weights(
    rng: Rng, name: str, *, num_experts: int = 3, hidden: int, width: int, mlp: Mlp | None = None
) -> Weights:
    """Weights for the path called ``name``; packed ones are random codes, scales and zeros."""
    path = BY_NAME[name]
    sizes = (num_experts, hidden, width)
    make = _random_packed if path.kind.is_rounded else _random_dense
    if path.kind.is_lossless:
        make = _random_lossless
    return make(rng, path, *sizes, Mlp() if mlp is None else mlp)


def random_mlp(rng: Rng, activation: Any, num_experts: int, hidden: int, width: int) -> Mlp:
    """With both biases."""
    b13_EF, b2_EH = normal(rng, num_experts, 2 * width), normal(rng, num_experts, hidden)
    return Mlp(activation=activation, b13_EF=b13_EF, b2_EH=b2_EH)


def _random_dense(rng: Rng, path: KernelPath, e: int, h: int, i: int, mlp: Mlp) -> Weights:
    w13_EFH = normal(rng, e, 2 * i, h) / np.float32(max(h, 1) ** 0.5)
    w2_EHI = normal(rng, e, h, i) / np.float32(max(i, 1) ** 0.5)
    return dense_weights(path, w13_EFH, w2_EHI, mlp)


def dense_weights(path: KernelPath, w13_EFH: F32, w2_EHI: F32, mlp: Mlp | None = None) -> Weights:
    if path.kind.codes == "bf16":
        codes = (f32_to_bf16(w13_EFH), f32_to_bf16(w2_EHI))
        w13_EFH, w2_EHI = (bf16_to_f32(bits) for bits in codes)
        experts = dense_experts(*codes, mlp)
    else:
        experts = dense_experts(w13_EFH, w2_EHI, mlp)
    wide = {"w13_EFH": w13_EFH.astype(np.float64), "w2_EHI": w2_EHI.astype(np.float64)}
    return Weights(path=path, experts=experts, **wide)


def _random_lossless(rng: Rng, path: KernelPath, e: int, h: int, i: int, mlp: Mlp) -> Weights:
    """Normal numbers, zeros, and a few that are far larger or smaller than their neighbours."""

    def matrix(rows: int, cols: int) -> U16:
        w_NK = normal(rng, rows, cols) / np.float32(cols**0.5)
        w_NK *= rng.choice([1, 0, 2**-30, 16], (rows, cols), p=[0.992, 0.005, 0.001, 0.002])
        w_NK[rng.random(rows) < 0.1] *= np.float32(2**-40)  # whole rows
        return f32_to_bf16(w_NK)

    experts = [(matrix(i, h), matrix(i, h), matrix(h, i)) for _ in range(e)]
    return lossless_weights(path, experts, h, i, mlp)


def lossless_weights(
    path: KernelPath,
    matrices: list[tuple[U16, U16, U16]],
    hidden: int,
    width: int,
    mlp: Mlp | None = None,
) -> Weights:
    """From the bits of gate, up and down of each expert."""
    shape = PackedShape(BF12, hidden, width)
    blob_EB = np.zeros((len(matrices), shape.expert_bytes), np.uint8)
    for blob_B, (gate_IH, up_IH, down_HI) in zip(blob_EB, matrices, strict=True):
        both = blob_B[: shape.w2_offset].reshape(shape.gate.num_blocks, 2, -1)
        pack_lossless(gate_IH, both[:, 0])
        pack_lossless(up_IH, both[:, 1])
        pack_lossless(down_HI, blob_B[shape.w2_offset :].reshape(shape.down.num_blocks, -1))
    w13 = [bf16_to_f32(np.concatenate(parts[:2])) for parts in matrices]
    return Weights(
        path=path,
        experts=packed_experts(blob_EB, shape, mlp),
        w13_EFH=np.array(w13, np.float64).reshape(-1, 2 * width, hidden),
        w2_EHI=np.array([bf16_to_f32(parts[2]) for parts in matrices], np.float64).reshape(
            -1, hidden, width
        ),
    )


def _random_packed(rng: Rng, path: KernelPath, e: int, h: int, i: int, mlp: Mlp) -> Weights:
    matrices = [
        tuple(random_matrix(rng, path.kind, rows, cols) for rows, cols in ((i, h), (i, h), (h, i)))
        for _ in range(e)
    ]
    return packed_weights(path, matrices, h, i, mlp)


def random_matrix(rng: Rng, kind: WeightKind, rows: int, cols: int) -> Quantised:
    """Codes and zero points of the whole range; a quarter of the scales is denormal as f16."""
    groups = -(-cols // kind.group)
    size_NG = (1 + rng.random((rows, groups))) / (kind.middle * cols**0.5)
    size_NG *= rng.choice([1, 1, -1, 2**-9], (rows, groups))
    scales_NG = decode_scales(encode_scales(size_NG, kind.scales), kind.scales)
    codes_NK = rng.integers(0, kind.max_code + 1, (rows, cols), np.uint8)
    zeros_NG = rng.integers(0, kind.max_code + 1, (rows, groups), np.uint8)
    return Quantised(codes_NK, scales_NG, zeros_NG if kind.has_zeros else None)


def packed_weights(
    path: KernelPath,
    matrices: list[tuple[Quantised, ...]],
    hidden: int,
    width: int,
    mlp: Mlp | None = None,
) -> Weights:
    """From gate, up and down of each expert."""
    kind = path.kind
    shape = PackedShape(kind, hidden, width)
    blob_EB = np.zeros((len(matrices), shape.expert_bytes), np.uint8)
    w13_EFH = np.zeros((len(matrices), 2 * width, hidden))
    w2_EHI = np.zeros((len(matrices), hidden, width))
    for e, (gate_IH, up_IH, down_HI) in enumerate(matrices):
        blob_EB[e] = pack_expert(kind, gate_IH, up_IH, down_HI)
        w13_EFH[e] = np.concatenate([dequantise(kind, *half) for half in (gate_IH, up_IH)])
        w2_EHI[e] = dequantise(kind, *down_HI)
    experts = packed_experts(blob_EB, shape, mlp)
    return Weights(path=path, experts=experts, w13_EFH=w13_EFH, w2_EHI=w2_EHI)


def add_layer(pool: ExpertPool, weights: Weights, **options: Any) -> ExpertLayer:
    return pool.add_layer(weights.experts, activations=weights.path.activations, **options)


def run_step(pool: ExpertPool, layer: ExpertLayer, step: Step) -> F32:
    """The pool's answer, in a buffer that held NaN before."""
    out_TH = np.full_like(step.x_TH, np.nan)
    pool.submit(layer, *step.arrays(), out_TH)
    pool.wait()
    return out_TH


def run(pool: ExpertPool, weights: Weights, step: Step) -> F32:
    """:func:`run_step` in a layer that is removed again."""
    layer = add_layer(pool, weights)
    try:
        return run_step(pool, layer, step)
    finally:
        pool.remove_layer(layer)


def reference(weights: Weights, step: Step, activations: str | None = None) -> F64:
    """float64, rounded where the kernel rounds, or as ``activations`` says."""
    mlp, path = weights.experts.mlp, weights.path
    options: dict[str, Any] = {
        "activation": mlp.activation,
        "b13_EF": None if mlp.b13_EF is None else mlp.b13_EF.astype(np.float64),
        "b2_EH": None if mlp.b2_EH is None else mlp.b2_EH.astype(np.float64),
        "activations": path.activations if activations is None else activations,
    }
    oracle: Callable[..., F64] = dense_layer_reference
    if path.kind.is_rounded:
        oracle, options["group"] = packed_layer_reference, path.kind.group
    return oracle(weights.w13_EFH, weights.w2_EHI, *step.arrays(), **options)


def relative_error(out_TH: F32, expected_TH: F64, at_least: float = 0.0) -> float:
    """||out - expected|| / ||expected||, or / ``at_least`` where that is larger."""
    size = max(float(np.linalg.norm(expected_TH)), at_least)
    wrong = float(np.linalg.norm(out_TH - expected_TH))
    return wrong / size if size > 0 else wrong


def typical_size(step: Step) -> float:
    """The norm that outputs of a step have: a floor for the few that cancel in tiny layers."""
    weight = float(np.linalg.norm(step.weights_TS[step.ids_TS >= 0]))
    return TYPICAL_OUT * weight * step.x_TH.shape[1] ** 0.5


def changed(step: Step, **arrays: Any) -> Step:
    return replace(step, **arrays)

"""Expert layers in float64, activations rounded or not: what the kernels must agree with.

T tokens, S slots of a token (its top k), H hidden, I width, E experts, F = 2I, K columns, G groups.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from cpu_kernels.activation_reference import ACTIVATIONS, Activation
from cpu_kernels.bf16 import F32, F64, Integers, bf16_to_f32, f32_to_bf16

I8 = npt.NDArray[np.int8]

# A group whose largest magnitude is below counts as zero. Then inv is finite, the scale is a normal
# number, and denormals become code 0 whether or not the CPU flushes them: 127 * 2**118 * 2**-126
# is less than a half.
SMALLEST = np.float32(2.0**-118)


def quantise_activations(x_TK: F32, group: int) -> tuple[I8, F32]:
    """int8 codes [T, P] (K padded with zeros to whole groups) and float32 scales [T, G].

    Exact to the bit, every operation rounded to float32: with m the largest magnitude of a group,
    ``inv = 127 / m``, ``code = rint(x * inv)`` (half to even), ``scale = m * (1 / 127)``.
    m < 2**-118: scale 0 and codes 0. NaN or Inf in the group: scale NaN and codes 0.
    """
    assert x_TK.dtype == np.float32, x_TK.dtype
    num_tokens, cols = x_TK.shape
    groups = -(-cols // group)
    x_TP = np.pad(x_TK, ((0, 0), (0, groups * group - cols)))
    x_TGL = x_TP.reshape(num_tokens, groups, group)
    most_TG = np.abs(x_TGL).max(axis=2, initial=0)
    is_finite_TG = np.isfinite(most_TG)
    is_coded_TG = is_finite_TG & (most_TG >= SMALLEST)
    most_TG = np.where(is_coded_TG, most_TG, np.float32(1))
    inv_TG = np.float32(127) / most_TG
    x_TGL = np.where(is_coded_TG[:, :, None], x_TGL, np.float32(0))
    codes_TGL = np.rint(x_TGL * inv_TG[:, :, None]).astype(np.int8)
    scales_TG = np.where(is_coded_TG, most_TG * (np.float32(1) / np.float32(127)), np.float32(0))
    scales_TG = np.where(is_finite_TG, scales_TG, np.float32(np.nan))
    return codes_TGL.reshape(num_tokens, -1), scales_TG


def packed_layer_reference(
    w13_EFH: F64,
    w2_EHI: F64,
    x_TH: F32,
    ids_TS: Integers,
    weights_TS: F32,
    *,
    group: int,
    activations: Literal["f32", "int8"],
    activation: Activation = "silu",
    b13_EF: F64 | None = None,
    b2_EH: F64 | None = None,
) -> F64:
    """:func:`dense_layer_reference` on dequantised weights.

    With "int8" activations, x and the intermediate go through :func:`quantise_activations`.
    """

    def through_int8(x_TK: F64) -> F64:
        codes_TP, scales_TG = quantise_activations(x_TK.astype(np.float32), group)
        scales_TP = np.repeat(scales_TG.astype(np.float64), group, axis=1)
        return (codes_TP * scales_TP)[:, : x_TK.shape[1]]

    operand = through_int8 if activations == "int8" else _unchanged
    weights = (w13_EFH, w2_EHI)
    return _layer(*weights, x_TH, ids_TS, weights_TS, activation, b13_EF, b2_EH, operand)


def dense_layer_reference(
    w13_EFH: F64,
    w2_EHI: F64,
    x_TH: F32,
    ids_TS: Integers,
    weights_TS: F32,
    *,
    activations: Literal["f32", "bf16"] = "f32",
    activation: Activation = "silu",
    b13_EF: F64 | None = None,
    b2_EH: F64 | None = None,
) -> F64:
    """Sum over a token's slots of weight * (w2 @ act(w13 @ x + b13) + b2); [T, H].

    F holds I gate rows, then I up rows. A slot with id -1 is skipped. With "bf16" activations, x
    and the intermediate are rounded to the nearest bf16, ties to even.
    """
    operand = _through_bf16 if activations == "bf16" else _unchanged
    weights = (w13_EFH, w2_EHI)
    return _layer(*weights, x_TH, ids_TS, weights_TS, activation, b13_EF, b2_EH, operand)


def _unchanged(x_TK: F64) -> F64:
    return x_TK


def _through_bf16(x_TK: F64) -> F64:
    return bf16_to_f32(f32_to_bf16(x_TK)).astype(np.float64)


def _layer(
    w13_EFH: F64,
    w2_EHI: F64,
    x_TH: F32,
    ids_TS: Integers,
    weights_TS: F32,
    activation: Activation,
    b13_EF: F64 | None,
    b2_EH: F64 | None,
    operand: Callable[[F64], F64],
) -> F64:
    """``operand`` makes what a product reads from what came before it."""
    out_TH = np.zeros(x_TH.shape)
    for expert in np.unique(ids_TS[ids_TS >= 0]):
        token_M, slot_M = np.nonzero(ids_TS == expert)
        both_MF = operand(x_TH[token_M].astype(np.float64)) @ w13_EFH[expert].T
        if b13_EF is not None:
            both_MF += b13_EF[expert]
        act_MI = ACTIVATIONS[activation](*np.split(both_MF, 2, axis=1))
        down_MH = operand(act_MI) @ w2_EHI[expert].T
        if b2_EH is not None:
            down_MH += b2_EH[expert]
        weight_M1 = weights_TS[token_M, slot_M].astype(np.float64)[:, None]
        np.add.at(out_TH, token_M, weight_M1 * down_MH)
    return out_TH

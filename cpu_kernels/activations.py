"""What happens between an expert's two products: act = f(gate, up), by number."""

import math

import numpy as np

from cpu_kernels.intrinsics import jit, power_of_two

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
SILU, GELU, GELU_TANH, CLAMPED_SWIGLU = range(4)

# exp(x) = 2^n exp(r), r = x - n ln 2, by the polynomial of the Cephes library.
EXP_MIN, EXP_MAX = np.float32(-87), np.float32(88)
LOG2_E = np.float32(1.44269504088896341)
ROUNDER = np.float32(1.5 * 2**23)  # added to a number it leaves the nearest integer in the low bits
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_TERMS = tuple(
    np.float32(term)
    for term in (
        *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
        *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    )
)

ONE, HALF = np.float32(1), np.float32(0.5)
SQRT_HALF = np.float32(math.sqrt(0.5))
TANH_INNER, TANH_CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)


@jit
def exp(x):
    """exp(x) for x in [-87, 88], limited to that; relative error below 3e-7.

    In plain arithmetic, so that the loops around it become vectors; the library's exp stays a call.
    """
    limited = x if x > EXP_MIN else EXP_MIN
    limited = limited if limited < EXP_MAX else EXP_MAX
    shifted = limited * LOG2_E + ROUNDER
    n = shifted - ROUNDER
    r = limited - n * LN2_HIGH - n * LN2_LOW
    p = EXP_TERMS[0]
    for term in EXP_TERMS[1:]:
        p = p * r + term
    return power_of_two(shifted) * (p * r * r + r + ONE)


@jit
def activate(kind, limit, alpha, gate, up, act):
    """act = f(gate, up), arrays of one length; ``kind`` is a place in ACTIVATIONS.

    0.5 (1 + tanh(u)) is sigmoid(2u). Clamped SwiGLU as in gpt-oss: gate is limited from above, up
    on both sides, and up counts from -1.
    """
    if kind == SILU:
        for k in range(len(act)):
            act[k] = gate[k] / (ONE + exp(-gate[k])) * up[k]
    elif kind == GELU:
        for k in range(len(act)):
            erf = np.float32(math.erf(gate[k] * SQRT_HALF))
            act[k] = HALF * gate[k] * (ONE + erf) * up[k]
    elif kind == GELU_TANH:
        for k in range(len(act)):
            g = gate[k]
            act[k] = g / (ONE + exp(-TANH_INNER * (g + TANH_CUBE * g * g * g))) * up[k]
    else:
        for k in range(len(act)):
            g = limit if gate[k] > limit else gate[k]
            u = limit if up[k] > limit else up[k]
            u = -limit if u < -limit else u
            act[k] = g / (ONE + exp(-alpha * g)) * (u + ONE)

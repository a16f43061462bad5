"""What happens between an expert's two products: act = f(gate, up), sixteen numbers at a time.

Written as LLVM vectors: a loop over the 16 rows of a block is too short for the optimiser, which
leaves it scalar (9 ns a number where whole vectors take 0.5 to 1).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from cpu_kernels import vector_ir as v
from cpu_kernels.addresses import f32_array
from cpu_kernels.intrinsics import intrinsic, jit
from cpu_kernels.vector_ir import F32, I32

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
SILU, GELU, GELU_TANH, CLAMPED_SWIGLU = range(4)
CHUNK = 16

# exp(x) = 2^n exp(r), r = x - n ln 2, by the polynomial of the Cephes library.
EXP_MIN, EXP_MAX = -87.0, 88.0
LOG2_E = 1.44269504088896341
ROUNDER = 1.5 * 2**23  # added to a number it leaves the nearest integer in the low bits
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_TERMS = (
    *(1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3),
    *(4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
)

HALF, ONE, SQRT_HALF = np.float32(0.5), np.float32(1), np.float32(math.sqrt(0.5))
TANH_INNER, TANH_CUBE = 2 * math.sqrt(2 / math.pi), 0.044715

# body(builder, gate, up, limit, alpha): act, all vectors of CHUNK float32
_Body = Callable[[Any, Any, Any, Any, Any], Any]


def _f32(value: float) -> Any:
    return v.constant(F32, CHUNK, float(np.float32(value)))


def _limited(builder: Any, x: Any, order: str, bound: Any) -> Any:
    """``bound`` where x lies beyond it, else x; NaN stays."""
    return builder.select(builder.fcmp_ordered(order, x, bound), bound, x)


def vector_exp(builder: Any, x: Any) -> Any:
    """exp(x) for x in [-87, 88], limited to that; relative error below 3e-7. NaN gives a number."""
    x = builder.select(builder.fcmp_ordered(">", x, _f32(EXP_MIN)), x, _f32(EXP_MIN))
    x = builder.select(builder.fcmp_ordered("<", x, _f32(EXP_MAX)), x, _f32(EXP_MAX))
    shifted = v.multiply_add(builder, x, _f32(LOG2_E), _f32(ROUNDER))
    n = builder.fsub(shifted, _f32(ROUNDER))
    r = v.multiply_add(builder, n, _f32(-LN2_HIGH), x)
    r = v.multiply_add(builder, n, _f32(-LN2_LOW), r)
    p = _f32(EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        p = v.multiply_add(builder, p, r, _f32(term))
    tail = builder.fadd(r, _f32(1))
    near_one = v.multiply_add(builder, builder.fmul(p, r), r, tail)
    number = v.wide(I32, CHUNK)
    exponent = builder.shl(builder.bitcast(shifted, number), v.constant(I32, CHUNK, 23))
    power = builder.add(exponent, v.constant(I32, CHUNK, 127 << 23))
    return builder.fmul(builder.bitcast(power, v.wide(F32, CHUNK)), near_one)


def _times_sigmoid(builder: Any, x: Any, inner: Any) -> Any:
    """x / (1 + exp(-inner))."""
    return builder.fdiv(x, builder.fadd(_f32(1), vector_exp(builder, builder.fneg(inner))))


def _silu(builder: Any, gate: Any, up: Any, limit: Any, alpha: Any) -> Any:
    return builder.fmul(_times_sigmoid(builder, gate, gate), up)


def _gelu_tanh(builder: Any, gate: Any, up: Any, limit: Any, alpha: Any) -> Any:
    """0.5 (1 + tanh(u)) is sigmoid(2u)."""
    cube = builder.fmul(builder.fmul(gate, gate), gate)
    inner = builder.fadd(gate, builder.fmul(_f32(TANH_CUBE), cube))
    inner = builder.fmul(_f32(TANH_INNER), inner)
    return builder.fmul(_times_sigmoid(builder, gate, inner), up)


def _clamped_swiglu(builder: Any, gate: Any, up: Any, limit: Any, alpha: Any) -> Any:
    """As in gpt-oss: gate is limited from above, up on both sides, and up counts from -1."""
    gate = _limited(builder, gate, ">", limit)
    up = _limited(builder, _limited(builder, up, ">", limit), "<", builder.fneg(limit))
    swish = _times_sigmoid(builder, gate, builder.fmul(alpha, gate))
    return builder.fmul(swish, builder.fadd(up, _f32(1)))


def make_chunk(body: _Body) -> Any:
    def chunk(typingctx, gate, up, act, limit, alpha):
        """act = f(gate, up): addresses of CHUNK float32, and the numbers of a clamped function."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            gate, up = (v.load(builder, address, F32, CHUNK) for address in args[:2])
            limit, alpha = (v.splat(builder, number, CHUNK) for number in args[3:])
            v.store(builder, body(builder, gate, up, limit, alpha), args[2])
            return context.get_dummy_value()

        i64, f32 = types.int64, types.float32
        return types.void(i64, i64, i64, f32, f32), codegen

    return intrinsic(chunk)


silu_chunk = make_chunk(_silu)
gelu_tanh_chunk = make_chunk(_gelu_tanh)
clamped_swiglu_chunk = make_chunk(_clamped_swiglu)


@jit
def gelu_chunk(gate_at, up_at, act_at):
    """With erf, one number after the other: 20 ns each."""
    gate, up, act = f32_array(gate_at, CHUNK), f32_array(up_at, CHUNK), f32_array(act_at, CHUNK)
    for k in range(CHUNK):
        erf = np.float32(math.erf(gate[k] * SQRT_HALF))
        act[k] = HALF * gate[k] * (ONE + erf) * up[k]


@jit
def activate(kind, limit, alpha, gate, up, act):
    """act = f(gate, up): addresses of CHUNK float32; ``kind`` is a place in ACTIVATIONS."""
    if kind == SILU:
        silu_chunk(gate, up, act, limit, alpha)
    elif kind == GELU:
        gelu_chunk(gate, up, act)
    elif kind == GELU_TANH:
        gelu_tanh_chunk(gate, up, act, limit, alpha)
    else:
        clamped_swiglu_chunk(gate, up, act, limit, alpha)

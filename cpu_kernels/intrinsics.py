"""What Numba has no words for: atomics, pauses, denormals, C functions and arrays at addresses."""

import os
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from cpu_kernels.isa import host_isa

# Typed as Any: Numba's declarations know neither the calls nor all of the options.
intrinsic: Any = numba_intrinsic
njit: Any = numba.njit
# Never called from Python: without wrappers for that they compile in half the time.
jit: Any = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

HAS_YIELD = hasattr(os, "sched_yield")
FLUSH_DENORMALS = 0x8040  # FTZ and DAZ of MXCSR

_WORDS = types.Array(types.int64, 1, "C")


def _element(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


@intrinsic
def atomic_load(typingctx, words, index):
    """words[index], sequentially consistent."""

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], *args)
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(_WORDS, types.int64), codegen


@intrinsic
def atomic_store(typingctx, words, index, value):
    """words[index] = value, sequentially consistent."""

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], *args[:2])
        builder.store_atomic(args[2], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(_WORDS, types.int64, types.int64), codegen


@intrinsic
def store_release(typingctx, words, index, value):
    """words[index] = value, seen by others only after all that this thread wrote before.

    A plain move on x86, where :func:`atomic_store` is an xchg that waits for all earlier stores.
    """

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], *args[:2])
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(_WORDS, types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx, words, index, value):
    """words[index] += value, sequentially consistent; returns the value before."""

    def codegen(context, builder, signature, args):
        pointer = _element(context, builder, signature.args[0], *args[:2])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(_WORDS, types.int64, types.int64), codegen


@intrinsic
def pause(typingctx):
    """Tell the core that this is a spin loop; nothing on a machine that is not x86."""

    def codegen(context, builder, signature, args):
        if host_isa().is_x86:
            hint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(hint, [])
        return context.get_dummy_value()

    return types.void(), codegen


def _access_mxcsr(builder, name, slot):
    pointer = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer])
    access = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
    builder.call(access, [builder.bitcast(slot, pointer)])


@intrinsic
def float_control(typingctx):
    """This thread's MXCSR, which says how floats round and whether denormals count (0: no x86)."""

    def codegen(context, builder, signature, args):
        slot = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        if host_isa().is_x86:
            _access_mxcsr(builder, "stmxcsr", slot)
        return builder.load(slot)

    return types.int32(), codegen


@intrinsic
def set_float_control(typingctx, control):
    """Set what :func:`float_control` reads."""

    def codegen(context, builder, signature, args):
        if host_isa().is_x86:
            _access_mxcsr(builder, "ldmxcsr", cgutils.alloca_once_value(builder, args[0]))
        return context.get_dummy_value()

    return types.void(types.int32), codegen


@jit
def flush_denormals():
    """From now on this thread reads and writes denormals as 0 (x86; elsewhere nothing happens).

    One product with a denormal costs some 150 cycles on Intel cores: ten times slower weights.
    """
    set_float_control(np.int32(float_control() | FLUSH_DENORMALS))


@intrinsic
def call_stage(typingctx, stage, job, phase, worker, num_workers):
    """Call the C function at address ``stage`` with the four int64 that follow."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


_usleep: Any = types.ExternalFunction("usleep", types.int32(types.uint32))


@jit
def nap():
    """Sleep for some 100 us; a pause where the system cannot."""
    if HAS_YIELD:
        _usleep(np.uint32(50))
    else:
        pause()


@jit
def yield_core():
    """Let another thread have this core if one waits; a pause where the system cannot."""
    if HAS_YIELD:
        _sched_yield()
    else:
        pause()

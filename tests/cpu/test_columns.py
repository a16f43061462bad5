"""Weight rows times packed tokens, against float64; by the level that FIDDLER_ISA leaves, too."""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt
import pytest
from numba import types

from cpu_kernels import columns
from cpu_kernels.addresses import f32_array
from cpu_kernels.column_tile import HAS_TILES, ROWS, TOKENS
from cpu_kernels.compiled import compile_entry, stamped
from cpu_kernels.isa import LEVELS, VARIABLE, host_isa, isa_from_features

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
FLOATS = 2.0**-23


@functools.cache
def entries() -> tuple[Callable[..., None], Callable[..., None]]:
    def pack(x, num_tokens, depth, packed):
        for t in range(num_tokens):
            block = packed + t // TOKENS * depth * columns.BLOCK_BYTES
            columns.pack_row(f32_array(x + 4 * t * depth, depth), t % TOKENS, block)

    def multiply(w, row_bytes, num_rows, x, num_blocks, depth, out, out_bytes):
        columns.multiply_columns(w, row_bytes, num_rows, x, num_blocks, depth, out, out_bytes)

    word = types.int64
    return (
        compile_entry(stamped(pack, int(HAS_TILES)), (word,) * 4),
        compile_entry(stamped(multiply, int(HAS_TILES)), (word,) * 8),
    )


def as_bf16(x: F32) -> U16:
    """To nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_f32(x: U16) -> F32:
    return (x.astype(np.uint32) << 16).view(np.float32)


def packed(x_TK: F32) -> U16:
    num_tokens, depth = x_TK.shape
    blocks = np.zeros(-(-num_tokens // TOKENS) * TOKENS * depth, np.uint16)
    entries()[0](x_TK.ctypes.data, num_tokens, depth, blocks.ctypes.data)
    return blocks


def product(w_RK: U16, x_TK: F32, num_rows: int | None = None) -> F32:
    """``[R, T]``; what lies behind the rows and the tokens' sums must not change."""
    num_tokens, depth = x_TK.shape
    num_blocks = -(-num_tokens // TOKENS)
    num_rows = len(w_RK) if num_rows is None else num_rows
    blocks = packed(x_TK)
    out = np.full((num_rows + 1, num_blocks * TOKENS + 3), np.float32(77))
    entries()[1](
        *(w_RK.ctypes.data, w_RK.strides[0], num_rows, blocks.ctypes.data),
        *(num_blocks, depth, out.ctypes.data, out.strides[0]),
    )
    assert (out[num_rows] == 77).all() and (out[:, num_blocks * TOKENS :] == 77).all()
    return out[:num_rows, :num_tokens]


def case(rng: np.random.Generator, num_rows: int, num_tokens: int, depth: int) -> tuple[U16, F32]:
    w_RK = as_bf16(rng.standard_normal((num_rows, depth), np.float32))
    return w_RK, rng.standard_normal((num_tokens, depth), np.float32)


SIZES = [(32, 1, 32), (64, 16, 2048), (96, 17, 768), (32, 48, 96), (70, 33, 64), (256, 100, 4096)]


@pytest.mark.parametrize(("num_rows", "num_tokens", "depth"), SIZES)
def test_equals_float64(
    rng: np.random.Generator, num_rows: int, num_tokens: int, depth: int
) -> None:
    w_RK, x_TK = case(rng, num_rows, num_tokens, depth)
    w, x = (as_f32(side).astype(np.float64) for side in (w_RK, as_bf16(x_TK)))
    bound_RT = depth * FLOATS * (np.abs(w) @ np.abs(x).T)
    assert (np.abs(product(w_RK, x_TK) - w @ x.T) <= bound_RT).all()


def test_packing_rounds_to_nearest_even(rng: np.random.Generator) -> None:
    x_TK = rng.standard_normal((TOKENS, 64), np.float32)
    x_TK[3, :4] = np.inf, -np.inf, 1 + 2.0**-8, 1 + 3 * 2.0**-8  # two ties
    blocks = packed(x_TK).reshape(32, TOKENS, 2).transpose(1, 0, 2).reshape(TOKENS, 64)
    assert np.array_equal(blocks, as_bf16(x_TK))


def test_bits_depend_on_no_neighbour(rng: np.random.Generator) -> None:
    w_RK, x_TK = case(rng, 3 * ROWS, 37, 256)
    whole = product(w_RK, x_TK)
    assert np.array_equal(product(w_RK, x_TK[20:21])[:, 0], whole[:, 20])
    assert np.array_equal(product(w_RK[ROWS:], x_TK), whole[ROWS:])
    assert np.array_equal(product(w_RK, x_TK, 2 * ROWS + 1), whole[: 2 * ROWS + 1])


def test_what_is_not_finite_stays_in_its_row_and_token(rng: np.random.Generator) -> None:
    w_RK, x_TK = case(rng, 2 * ROWS, 20, 64)
    w_RK[5, 9], x_TK[18, 2] = 0x7FC0, np.inf
    is_finite_RT = np.isfinite(product(w_RK, x_TK))
    assert not is_finite_RT[5].any() and not is_finite_RT[:, 18].any()
    assert is_finite_RT.sum() == (2 * ROWS - 1) * 19


def test_rows_may_lie_apart(rng: np.random.Generator) -> None:
    w_RK, x_TK = case(rng, 2 * ROWS, 5, 192)
    assert np.array_equal(
        product(w_RK[:, :128], x_TK[:, :128].copy()),
        product(w_RK[:, :128].copy(), x_TK[:, :128].copy()),
    )


def can_run(level: str) -> bool:
    try:
        isa_from_features(platform.machine(), "", dict(llvm.get_host_cpu_features()), level)
    except ValueError:
        return False
    return level != host_isa().level


@pytest.mark.parametrize("level", [level for level in LEVELS if can_run(level)])
def test_lesser_levels_pass_these_tests_too(level: str) -> None:
    names = "equals_float64 or depend_on_no_neighbour"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names],
        env=os.environ | {VARIABLE: level},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

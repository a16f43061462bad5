"""Weight rows times packed tokens, against float64; by the level that FIDDLER_ISA leaves, too."""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from lesser_levels import LESSER_LEVELS, passes
from numba import types

from cpu_kernels import columns
from cpu_kernels.column_panels import UNIT as ROWS
from cpu_kernels.column_tile import TOKENS
from cpu_kernels.compiled import compile_entry, stamped

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
FLOATS = 2.0**-23


@functools.cache
def entries() -> tuple[Callable[..., None], Callable[..., None]]:
    def pack(x, x_bytes, num_tokens, depth, packed):
        for t in range(-(-num_tokens // TOKENS) * TOKENS):
            block = packed + t // TOKENS * depth * columns.BLOCK_BYTES
            row = x + x_bytes * t * depth if t < num_tokens else 0
            columns.pack_row(row, x_bytes, depth, t % TOKENS, block)

    def multiply(w, row_bytes, num_rows, apart, num_runs, x, num_blocks, depth, sums):
        columns.multiply_columns(
            w, row_bytes, num_rows, apart, num_runs, x, num_blocks, depth, sums
        )

    word = types.int64
    return (
        compile_entry(stamped(pack), (word,) * 5),
        compile_entry(stamped(multiply), (word,) * 9),
    )


def as_bf16(x: F32) -> U16:
    """To nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_f32(x: U16) -> F32:
    return (x.astype(np.uint32) << 16).view(np.float32)


def packed(x_TK: F32 | U16) -> U16:
    """Blocks of bf16 numbers, which may lie in float32; padding that is not zero would show."""
    num_tokens, depth = x_TK.shape
    blocks = np.full(-(-num_tokens // TOKENS) * TOKENS * depth, 77, np.uint16)
    address, size = x_TK.ctypes.data, x_TK.itemsize
    entries()[0](address, size, num_tokens, depth, blocks.ctypes.data)
    return blocks


def product(w_RK: U16, x_TK: U16, *, num_runs: int = 1) -> F32:
    """``[R, T]``, the rows in so many runs; what lies behind their sums must not change."""
    num_tokens, depth = x_TK.shape
    num_blocks, num_rows = -(-num_tokens // TOKENS), len(w_RK) // num_runs
    blocks = packed(x_TK)
    sums = np.full(num_blocks * len(w_RK) * TOKENS + 3, np.float32(77))
    row_bytes = w_RK.strides[0]
    entries()[1](
        *(w_RK.ctypes.data, row_bytes, num_rows, num_rows * row_bytes, num_runs),
        *(blocks.ctypes.data, num_blocks, depth, sums.ctypes.data),
    )
    assert (sums[-3:] == 77).all()
    of_blocks = sums[:-3].reshape(num_blocks, len(w_RK), TOKENS)
    return of_blocks.transpose(1, 0, 2).reshape(len(w_RK), -1)[:, :num_tokens]


def case(rng: np.random.Generator, num_rows: int, num_tokens: int, depth: int) -> tuple[U16, U16]:
    w_RK = as_bf16(rng.standard_normal((num_rows, depth), np.float32))
    return w_RK, as_bf16(rng.standard_normal((num_tokens, depth), np.float32))


SIZES = [(32, 1, 32), (64, 16, 2048), (96, 17, 768), (32, 48, 96), (64, 33, 544), (256, 100, 4096)]


@pytest.mark.parametrize(("num_rows", "num_tokens", "depth"), SIZES)
def test_equals_float64(
    rng: np.random.Generator, num_rows: int, num_tokens: int, depth: int
) -> None:
    w_RK, x_TK = case(rng, num_rows, num_tokens, depth)
    w, x = (as_f32(side).astype(np.float64) for side in (w_RK, x_TK))
    bound_RT = depth * FLOATS * (np.abs(w) @ np.abs(x).T)
    assert (np.abs(product(w_RK, x_TK) - w @ x.T) <= bound_RT).all()


def test_packed_numbers_are_those_of_the_tokens(rng: np.random.Generator) -> None:
    _, x_TK = case(rng, 1, TOKENS + 3, 64)
    x_TK[3, :3] = 0x7F80, 0xFF80, 0x8000  # Inf, -Inf, -0
    for rows in (x_TK, as_f32(x_TK)):
        blocks = packed(rows).reshape(2, 32, TOKENS, 2).transpose(0, 2, 1, 3).reshape(-1, 64)
        assert np.array_equal(blocks[: len(x_TK)], x_TK) and not blocks[len(x_TK) :].any()


def test_bits_depend_on_no_neighbour(rng: np.random.Generator) -> None:
    w_RK, x_TK = case(rng, 3 * ROWS, 37, 1536)
    whole = product(w_RK, x_TK)
    assert np.array_equal(product(w_RK, x_TK[20:21])[:, 0], whole[:, 20])
    assert np.array_equal(product(w_RK[ROWS:], x_TK), whole[ROWS:])
    assert np.array_equal(product(w_RK, x_TK, num_runs=3), whole)


def test_what_is_not_finite_stays_in_its_row_and_token(rng: np.random.Generator) -> None:
    w_RK, x_TK = case(rng, 2 * ROWS, 20, 64)
    w_RK[5, 9], x_TK[18, 2] = 0x7FC0, 0x7F80
    is_finite_RT = np.isfinite(product(w_RK, x_TK))
    assert not is_finite_RT[5].any() and not is_finite_RT[:, 18].any()
    assert is_finite_RT.sum() == (2 * ROWS - 1) * 19


def test_rows_may_lie_apart(rng: np.random.Generator) -> None:
    w_RK, x_TK = case(rng, 2 * ROWS, 5, 192)
    assert np.array_equal(
        product(w_RK[:, :128], x_TK[:, :128].copy()),
        product(w_RK[:, :128].copy(), x_TK[:, :128].copy()),
    )


@pytest.mark.parametrize("level", LESSER_LEVELS)
def test_lesser_levels_pass_these_tests_too(level: str) -> None:
    passes(level, __file__, "equals_float64 or depend_on_no_neighbour")

"""bf12 weight blocks times packed tokens, against float64; by the lesser levels of ISA, too."""

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from lesser_levels import LESSER_LEVELS, passes
from numba import types

from cpu_kernels import lossless_columns
from cpu_kernels.bf16 import bf16_to_f32, f32_to_bf16, widen
from cpu_kernels.column_tile import TOKENS
from cpu_kernels.compiled import compile_entry, stamped
from cpu_kernels.lossless import lossless_blocks, unpack_lossless
from cpu_kernels.lossless_columns import BLOCK_BYTES, PART_BYTES
from cpu_kernels.packed_layout import BLOCK_ROWS, MatrixShape
from cpu_kernels.weight_kind import BF12

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
FLOATS = 2.0**-23
GUARD = np.float32(77)


@functools.cache
def entries() -> tuple[Callable[..., None], Callable[..., None]]:
    def pack(x, num_tokens, depth, packed):
        for t in range(-(-num_tokens // TOKENS) * TOKENS):
            block = packed + t // TOKENS * depth * BLOCK_BYTES
            row = x + 4 * t * depth if t < num_tokens else 0
            lossless_columns.pack_row(row, depth, t % TOKENS, block)

    def multiply(w, block_bytes, num_w, x, num_x, depth, sums, pairs):
        lossless_columns.multiply_lossless(w, block_bytes, num_w, 0, x, num_x, depth, sums, pairs)
        for n in range(num_w):
            of_block = sums + n * num_x * lossless_columns.SUMS
            lossless_columns.finish_block(w + n * block_bytes, x, num_x, depth, of_block)

    word = types.int64
    return (
        compile_entry(stamped(pack), (word,) * 4),
        compile_entry(stamped(multiply), (word,) * 8),
    )


def blocks_of(bits_NK: U16) -> U8:
    blocks_BX = lossless_blocks(bits_NK)
    assert np.array_equal(unpack_lossless(*bits_NK.shape, blocks_BX), bits_NK)
    return blocks_BX


def packed(x_TK: U16, padded_cols: int) -> U16:
    """Blocks of tokens, from rows of float32 as they are prepared: lifted, with zeros behind."""
    num_tokens, depth = x_TK.shape
    rows = np.zeros((num_tokens, padded_cols), np.float32)
    rows[:, :depth] = bf16_to_f32(x_TK) * np.float32(2.0**64)
    blocks = np.full(-(-num_tokens // TOKENS) * TOKENS * padded_cols, 77, np.uint16)
    entries()[0](rows.ctypes.data, num_tokens, padded_cols, blocks.ctypes.data)
    return blocks


def product(bits_NK: U16, x_TK: U16) -> F32:
    """``[T, N]``; what lies behind the sums must not change."""
    shape, num_tokens = MatrixShape(BF12, *bits_NK.shape), len(x_TK)
    num_w, num_x = shape.num_blocks, -(-num_tokens // TOKENS)
    weights, tokens = blocks_of(bits_NK), packed(x_TK, shape.padded_cols)
    pairs = np.zeros(num_w * PART_BYTES, np.uint8)
    sums = np.full(num_w * num_x * TOKENS * BLOCK_ROWS + 3, GUARD)
    entries()[1](
        *(weights.ctypes.data, shape.block_bytes, num_w, tokens.ctypes.data, num_x),
        *(shape.padded_cols, sums.ctypes.data, pairs.ctypes.data),
    )
    assert (sums[-3:] == GUARD).all()
    of_blocks = sums[:-3].reshape(num_w, num_x * TOKENS, BLOCK_ROWS)
    padded_TN = of_blocks.transpose(1, 0, 2).reshape(num_x * TOKENS, -1)
    assert not padded_TN[:, shape.rows :].any() and not padded_TN[num_tokens:].any()
    return padded_TN[:num_tokens, : shape.rows]


def case(rng: np.random.Generator, rows: int, num_tokens: int, cols: int) -> tuple[U16, U16]:
    """Each row has a size of its own; some weights are larger and smaller than codes can be."""
    w_NK = rng.standard_normal((rows, cols), np.float32)
    w_NK *= 2.0 ** rng.integers(-40, 10, (rows, 1))
    planted = rng.choice(w_NK.size, w_NK.size // 400, replace=False)
    w_NK.reshape(-1)[planted] *= 2.0 ** rng.choice([-30.0, 20.0], len(planted))
    w_NK.reshape(-1)[rng.choice(w_NK.size, 3)] = 0
    x_TK = rng.standard_normal((num_tokens, cols), np.float32)
    return f32_to_bf16(w_NK), f32_to_bf16(x_TK)


def bound(w_NK: F64, x_TK: F64) -> F64:
    return w_NK.shape[1] * FLOATS * (np.abs(x_TK) @ np.abs(w_NK).T)


SIZES = [(16, 1, 64), (32, 16, 2048), (48, 17, 768), (17, 48, 100), (150, 33, 1090), (64, 100, 520)]


@pytest.mark.parametrize(("rows", "num_tokens", "cols"), SIZES)
def test_equals_float64(rng: np.random.Generator, rows: int, num_tokens: int, cols: int) -> None:
    w_NK, x_TK = case(rng, rows, num_tokens, cols)
    w, x = widen(w_NK), widen(x_TK)
    assert (np.abs(product(w_NK, x_TK) - x @ w.T) <= bound(w, x)).all()


def test_every_code_is_decoded_exactly() -> None:
    """One token that has a single 1: sums are the weights."""
    exponents, mantissas = np.meshgrid(np.arange(118, 133), np.arange(128), indexing="ij")
    bits = (exponents << 7 | mantissas).astype(np.uint16).reshape(-1)
    w_NK = np.concatenate([bits, bits | 0x8000]).reshape(-1, 64)
    x_TK = f32_to_bf16(np.eye(64, dtype=np.float32))
    assert np.array_equal(product(w_NK, x_TK), bf16_to_f32(w_NK).T)


def test_a_block_full_of_exceptions(rng: np.random.Generator) -> None:
    w_NK, x_TK = case(rng, 16, 40, 512)
    w_NK[3] = f32_to_bf16(rng.standard_normal(512, np.float32))
    w_NK[3, 7:39] = f32_to_bf16(rng.standard_normal(32, np.float32) * np.float32(2.0**90))
    w_NK[:3], w_NK[4:] = w_NK[3] & 0x8000, 0
    w, x = widen(w_NK), widen(x_TK)
    assert (np.abs(product(w_NK, x_TK) - x @ w.T) <= bound(w, x)).all()


def test_bits_depend_on_no_neighbour(rng: np.random.Generator) -> None:
    w_NK, x_TK = case(rng, 7 * 16, 37, 1536)
    whole = product(w_NK, x_TK)
    assert np.array_equal(product(w_NK, x_TK[20:21])[0], whole[20])
    assert np.array_equal(product(w_NK[48:64], x_TK), whole[:, 48:64])


def test_what_is_not_finite_stays_in_its_token(rng: np.random.Generator) -> None:
    w_NK, x_TK = case(rng, 32, 20, 64)
    x_TK[18, 2], x_TK[3, 60] = 0x7F80, 0x7FC0
    is_finite_TN = np.isfinite(product(w_NK, x_TK))
    assert not is_finite_TN[[3, 18]].any() and is_finite_TN.sum() == 18 * 32


@pytest.mark.parametrize("level", LESSER_LEVELS)
def test_lesser_levels_pass_these_tests_too(level: str) -> None:
    passes(level, __file__, "equals_float64 or decoded_exactly or depend_on_no_neighbour")

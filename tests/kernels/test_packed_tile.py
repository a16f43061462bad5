"""Codes of a tile, decoded by the kernels' own functions, against the packer's, exactly."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from expert_case import packed_layout, random_matrix
from paged_batch import DEVICE

from cpu_kernels.packed_layout import pack_matrix
from cpu_kernels.weight_kind import ROUNDED_KINDS, parse_kind
from gpu_kernels.expert_weights import Activation
from gpu_kernels.packed_tile import decode_words, load_group, load_words, order_depth, tile_row
from gpu_kernels.tile_spec import TileSpec

ROWS, GROUPS = 32, 3


@triton.jit
def decode_kernel(
    blob_ptr, column_ptr, weight_ptr, rows_ptr, columns_ptr, group, SPEC: tl.constexpr
):
    """Group ``group`` of a matrix of two blocks, and which rows and columns the results are."""
    M: tl.constexpr = SPEC.tile_rows
    GROUP: tl.constexpr = SPEC.group
    BYTES: tl.constexpr = SPEC.block_bytes
    WORDS: tl.constexpr = GROUP * SPEC.bits // 32
    m_M = tl.arange(0, M)
    d_D = tl.arange(0, GROUP)
    row_M = tile_row(m_M, SPEC)
    scale_M, zero_M = load_group(blob_ptr + row_M // 16 * BYTES, row_M, group, SPEC)
    block_ptr_B = blob_ptr + tl.arange(0, M // 16) * BYTES
    words_MS = load_words(block_ptr_B, group * WORDS, WORDS, SPEC)
    codes_MD = decode_words(words_MS, zero_M[:, None], weight_ptr.dtype.element_ty, SPEC)
    weights_MD = codes_MD.to(tl.float32) * scale_M[:, None]
    out_ptr_MD = weight_ptr + m_M[:, None] * GROUP + d_D[None, :]
    tl.store(out_ptr_MD, weights_MD.to(weight_ptr.dtype.element_ty))
    tl.store(rows_ptr + m_M, row_M)
    # the order of depth, shown by putting column numbers through it
    column_MD = tl.load(column_ptr + m_M[:, None] * 0 + d_D[None, :])
    ordered_MD = order_depth(column_MD, SPEC)
    tl.store(columns_ptr + m_M[:, None] * GROUP + d_D[None, :], ordered_MD)


def decoded(name: str, dtype: torch.dtype, in_registers: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The last group of a matrix as the kernel sees it, and as it was packed."""
    kind = parse_kind(name)
    rng = np.random.default_rng(1)
    cols = GROUPS * kind.group
    matrix = random_matrix(rng, kind, ROWS, cols)
    # scales of 1 and 2, so that every weight is exact in 16 bits
    matrix = matrix._replace(scales_NG=rng.choice([1.0, 2.0], (ROWS, GROUPS)).astype(np.float32))
    blob = torch.from_numpy(pack_matrix(kind, *matrix)).to(DEVICE)
    layout = packed_layout(kind, cols, ROWS)
    spec = TileSpec(
        paired=False,
        rows=ROWS,
        depth=cols,
        tile_rows=ROWS,
        columns=8,
        step=kind.group,
        in_registers=in_registers,
        activation=Activation(),
        bits=kind.bits,
        group=kind.group,
        has_zeros=kind.has_zeros,
        scale_dtype=tl.float16 if kind.scales == "f16" else tl.bfloat16,
        block_bytes=layout.block_bytes(cols),
        scale_offset=layout.scale_offset(cols),
        zero_offset=layout.zero_offset(cols),
    )
    weights = torch.empty((ROWS, kind.group), dtype=dtype, device=DEVICE)
    rows = torch.empty(ROWS, dtype=torch.int32, device=DEVICE)
    columns = torch.empty((ROWS, kind.group), dtype=torch.int32, device=DEVICE)
    column = torch.arange(kind.group, dtype=torch.int32, device=DEVICE)
    decode_kernel[(1,)](blob, column, weights, rows, columns, GROUPS - 1, SPEC=spec, num_warps=2)
    natural = torch.empty_like(weights)
    natural[rows.long()[:, None], columns.long()] = weights
    zeros = np.full((ROWS, 1), kind.middle) if matrix.zeros_NG is None else matrix.zeros_NG[:, -1:]
    codes = matrix.codes_NK[:, -kind.group :].astype(np.float32) - zeros
    return natural, torch.from_numpy(codes * matrix.scales_NG[:, -1:]).to(DEVICE, dtype)


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("kind", ROUNDED_KINDS, ids=lambda kind: kind.name)
def test_codes_are_exact(kind: object, in_registers: bool) -> None:
    actual, expected = decoded(kind.name, torch.float32, in_registers)  # type: ignore[attr-defined]
    assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("kind", ROUNDED_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_are_exact_in_half_dtypes_on_the_gpu(
    dtype: torch.dtype, kind: object, in_registers: bool
) -> None:
    actual, expected = decoded(kind.name, dtype, in_registers)  # type: ignore[attr-defined]
    assert torch.equal(actual, expected)

"""bf12 weights times columns of the identity are the weights: what the kernels see, to the bit."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from expert_case import lossless_matrix, packed_layout
from paged_batch import DEVICE
from torch import Tensor

from cpu_kernels.bf16 import F32, U16, bf16_to_f32, f32_to_bf16
from cpu_kernels.lossless import lossless_blocks
from cpu_kernels.packed_layout import MatrixShape
from cpu_kernels.weight_kind import BF12
from gpu_kernels.device import family
from gpu_kernels.expert_weights import Activation
from gpu_kernels.lossless_products import lossless_products
from gpu_kernels.lossless_reference import lossless_matrix as lossless_reference
from gpu_kernels.packed_tile import tile_row
from gpu_kernels.tile_spec import TileSpec

ROWS, COLUMNS = 37, 128
SMALLEST = 2.0**-126  # of normal numbers: tensor cores may take smaller ones for 0


@triton.jit
def products_kernel(w_ptr, x_ptr, out_ptr, begin, num_columns, SPEC: tl.constexpr):
    """Row n of ``x_ptr`` gives column n of every row's products, float32."""
    M: tl.constexpr = SPEC.tile_rows
    N: tl.constexpr = SPEC.columns
    n_N = tl.program_id(1) * N + tl.arange(0, N)
    first_row = tl.program_id(0) * (M if SPEC.paired else 2 * M)
    a_MN, b_MN, _, _ = lossless_products(
        w_ptr,
        first_row,
        tl.program_id(2),
        begin,
        x_ptr,
        n_N.to(tl.int64) * SPEC.depth,
        n_N < num_columns,
        None,
        None,
        SPEC,
    )
    row_M = first_row + tile_row(tl.arange(0, M), SPEC)
    second_M = row_M + (SPEC.rows if SPEC.paired else M)
    end = 2 * SPEC.rows if SPEC.paired else SPEC.rows
    out_ptr += (tl.program_id(2) * end + row_M)[:, None] * num_columns + n_N[None, :]
    is_used_N = n_N < num_columns
    tl.store(out_ptr, a_MN, mask=(row_M < SPEC.rows)[:, None] & is_used_N[None, :])
    out_ptr += (second_M - row_M)[:, None] * num_columns
    tl.store(out_ptr, b_MN, mask=(second_M < end)[:, None] & is_used_N[None, :])


def packed(bits_NK: U16) -> tuple[MatrixShape, np.ndarray]:
    return MatrixShape(BF12, *bits_NK.shape), lossless_blocks(bits_NK)


def products(
    matrices: list[U16],
    tile: tuple[int, int, int],
    in_registers: bool,
    *,
    begin: int | None = None,
    splits: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``[splits, rows of all matrices, K]``: of one matrix, or of two whose blocks alternate."""
    shapes, blocks = zip(*(packed(bits_NK) for bits_NK in matrices), strict=True)
    shape = shapes[0]
    # bytes with all bits set stand around the weights
    blob = np.full((3, len(matrices) * shape.nbytes), 255, np.uint8)
    blob[1] = np.stack(blocks, axis=1).ravel()
    tile_rows, columns, step = tile
    spec = TileSpec(
        paired=len(matrices) == 2,
        rows=shape.rows,
        depth=shape.cols,
        tile_rows=tile_rows,
        columns=columns,
        step=step,
        in_registers=in_registers,
        activation=Activation(),
        splits=splits,
        unit=0 if begin is None else 64,
        bits=12,
        group=64,
        scale_dtype=tl.bfloat16,
        block_bytes=shape.block_bytes,
        scale_offset=shape.scale_offset,
        waits=not in_registers and family(DEVICE) == "sm90",
    )
    x_KK = torch.eye(shape.cols, dtype=dtype, device=DEVICE)
    if begin is not None:
        x_KK[:, :begin] = torch.nan  # not read
    rows = len(matrices) * shape.rows
    out = torch.full((splits, rows, shape.cols), torch.nan, device=DEVICE)
    grid = (spec.num_tiles(shape.rows), triton.cdiv(shape.cols, columns), splits)
    weights = torch.from_numpy(blob).to(DEVICE)[1]
    products_kernel[grid](
        weights, x_KK, out, begin, shape.cols, SPEC=spec, num_warps=max(1, tile_rows // 16)
    )
    return out


def exact(found: Tensor, bits_NK: U16) -> bool:
    """Equal, apart from denormal numbers on a GPU; NaN is never."""
    wanted = torch.from_numpy(bf16_to_f32(bits_NK)).to(found)
    different = (found - wanted).abs()
    return bool((different <= (SMALLEST if DEVICE == "cuda" else 0)).all())


def ugly(rng: np.random.Generator, rows: int, cols: int) -> U16:
    """Zeros of both signs, denormal, tiny and huge weights: among others, and as rows of theirs."""
    weights_NK: F32 = 2 ** rng.uniform(-3, 1, (rows, cols)).astype(np.float32)
    weights_NK[1] = 0
    weights_NK[2, ::2] = -0.0
    weights_NK[3] = 0
    weights_NK[3, [0, 5, -1]] = 1e-39, -3e-40, 9e-41
    weights_NK[4] *= np.float32(2.0**12)  # no scale is larger
    weights_NK[4, 3:5] = 3e-38, -1e-39
    weights_NK[5] *= np.float32(2.0**-120)
    weights_NK[6, [0, -1]] = 3e38, -1e-38
    return f32_to_bf16(weights_NK)


TILES = [(16, COLUMNS, 32), (32, COLUMNS, 128), (64, COLUMNS, 64)]


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("cols", [8, 65, 300])
def test_weights_are_exact(cols: int, tile: tuple[int, int, int], in_registers: bool) -> None:
    bits_NK = lossless_matrix(np.random.default_rng(cols), ROWS, cols)
    assert exact(products([bits_NK], tile, in_registers)[0], bits_NK)


def test_gate_and_up_take_turns() -> None:
    rng = np.random.default_rng(0)
    matrices = [lossless_matrix(rng, ROWS, 140) for _ in range(2)]
    assert exact(products(matrices, TILES[0], True)[0], np.concatenate(matrices))


@pytest.mark.parametrize("in_registers", [False, True])
def test_ugly_weights_are_exact(in_registers: bool) -> None:
    bits_NK = ugly(np.random.default_rng(0), ROWS, 130)
    assert exact(products([bits_NK], TILES[2], in_registers)[0], bits_NK)


@pytest.mark.parametrize("begin", [None, 0, 64, 256])
@pytest.mark.parametrize(("tile", "splits"), [(TILES[0], 3), (TILES[1], 2), (TILES[2], 1)])
def test_each_part_of_the_depth_has_its_exceptions(
    tile: tuple[int, int, int], splits: int, begin: int | None
) -> None:
    bits_NK = lossless_matrix(np.random.default_rng(3), ROWS, 300)
    found = products([bits_NK], tile, True, begin=begin, splits=splits)[:, :, begin or 0 :]
    bits_NK = bits_NK[:, begin or 0 :]
    assert exact(found.sum(0), bits_NK)
    # a weight is in one part and in no other
    assert ((found != 0).sum(0) <= 1).all()
    parts = (found != 0).any(1)  # [splits, columns]
    assert (parts.sum(0) == 1).all() and (parts.int().argmax(0).diff() >= 0).all()


@pytest.mark.parametrize("rows", [1, 16, 50])
@pytest.mark.parametrize("cols", [1, 64, 300])
def test_reference_is_exact(rows: int, cols: int) -> None:
    for make in (lossless_matrix, ugly) if rows * cols > 320 else (lossless_matrix,):
        bits_NK = make(np.random.default_rng(1), rows, cols)
        _, blocks = packed(bits_NK)
        layout = packed_layout(BF12, cols, rows)
        found = lossless_reference(torch.from_numpy(blocks), layout.scale_offset(cols))[
            :rows, :cols
        ]
        wanted = torch.from_numpy(bf16_to_f32(bits_NK))
        assert torch.equal(found.contiguous().view(torch.int32), wanted.view(torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tile", "in_registers"),
    [((16, 8, 128), True), ((32, 32, 128), True), ((64, 64, 64), True), ((64, 128, 64), False)],
)
def test_weights_are_exact_on_the_gpu(
    tile: tuple[int, int, int], in_registers: bool, dtype: torch.dtype
) -> None:
    if dtype == torch.float32:
        tile = (16, 16, 32)  # larger ones take long to compile
    rng = np.random.default_rng(0)
    for make, cols in ((lossless_matrix, 2048), (lossless_matrix, 1000), (ugly, 768)):
        bits_NK = make(rng, 200, cols)
        assert exact(products([bits_NK], tile, in_registers, dtype=dtype)[0], bits_NK)
        split = products([bits_NK], tile, in_registers, dtype=dtype, begin=320, splits=3)
        assert exact(split.sum(0)[:, 320:], bits_NK[:, 320:])

"""bf12: what is packed comes back to the bit, or is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.bf16 import U16, f32_to_bf16
from cpu_kernels.lossless import pack_lossless, unpack_lossless
from cpu_kernels.neuron_scales import ColumnExponents, drop_unfit_rows, scaled
from cpu_kernels.packed_layout import U8, MatrixShape, PackedShape
from cpu_kernels.weight_kind import BF12


def packed(weights_NK: U16) -> U8:
    shape = MatrixShape(BF12, *weights_NK.shape)
    blocks = np.full((shape.num_blocks, 2, shape.block_bytes), 0xA5, np.uint8)
    pack_lossless(weights_NK, blocks[:, 1])
    assert (blocks[:, 0] == 0xA5).all()
    return blocks[:, 1]


def normal(seed: int, rows: int, cols: int, size: float = 0.02) -> U16:
    rng = np.random.default_rng(seed)
    return f32_to_bf16(rng.standard_normal((rows, cols), np.float32) * np.float32(size))


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (16, 64), (17, 65), (40, 48), (3, 700), (100, 2048)]
)
@pytest.mark.parametrize("size", [2.0**-100, 0.02, 1.0, 2.0**12])
def test_normal_numbers_come_back(rows: int, cols: int, size: float) -> None:
    weights_NK = normal(rows, rows, cols, size)
    assert np.array_equal(unpack_lossless(rows, cols, packed(weights_NK)), weights_NK)


@settings(max_examples=200)
@given(st.data())
def test_any_numbers_come_back(data: st.DataObject) -> None:
    """Normal ones, and among them any finite bits: zeros, denormals, the largest."""
    rows, cols = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 80)))
    weights_NK = normal(data.draw(st.integers(0, 9)), rows, cols)
    planted = st.tuples(
        st.integers(0, rows - 1), st.integers(0, cols - 1), st.integers(0, 0xFFFF)
    ).filter(lambda one: one[2] & 0x7F80 != 0x7F80)
    for row, col, bits in data.draw(st.lists(planted, max_size=8)):
        weights_NK[row, col] = bits
    assert np.array_equal(unpack_lossless(rows, cols, packed(weights_NK)), weights_NK)


def test_as_many_exceptions_as_there_is_room_for() -> None:
    weights_NK = normal(0, 32, 512)
    room = MatrixShape(BF12, 32, 512).most_exceptions
    assert room == 32
    weights_NK[3] = 0x3F80  # ones
    weights_NK[3, :room] = 0x0080  # the smallest normal number
    weights_NK[:3] = weights_NK[4:16] = 0
    assert np.array_equal(unpack_lossless(32, 512, packed(weights_NK)), weights_NK)
    weights_NK[3, room] = 0x0080
    with pytest.raises(ValueError, match="16 neighbouring rows have more than 32 weights"):
        packed(weights_NK)


def test_the_last_column_that_an_exception_can_name() -> None:
    weights_NK = normal(0, 2, 1 << 16)
    weights_NK[1, -1] = 0x0080
    assert np.array_equal(unpack_lossless(*weights_NK.shape, packed(weights_NK)), weights_NK)
    with pytest.raises(ValueError, match="rows have 65537 weights, more than 65536"):
        packed(normal(0, 2, (1 << 16) + 1))


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_what_is_no_finite_number_is_refused(bits: int) -> None:
    weights_NK = normal(0, 20, 30)
    weights_NK[17, 29] = bits
    with pytest.raises(ValueError, match="NaN or Inf"):
        packed(weights_NK)


@pytest.mark.parametrize("sides", [(4096, 14336), (2048, 768)])
def test_a_quarter_less_than_bf16(sides: tuple[int, int]) -> None:
    hidden, width = sides
    assert 0.75 < PackedShape(BF12, hidden, width).expert_bytes / (6 * hidden * width) < 0.765


def test_neurons_that_training_gave_up_fit_when_scaled() -> None:
    up_IH, down_HI = normal(1, 128, 64), normal(2, 64, 128)
    given_up = np.zeros(128, np.int64)
    given_up[::3] = -18
    up_IH, down_HI = scaled(up_IH, given_up[:, None]), scaled(down_HI, given_up)
    down_HI[0, 0] = 0  # a zero stays one
    with pytest.raises(ValueError, match="exponents of their own"):
        packed(down_HI)
    columns = ColumnExponents(128)
    columns.add(down_HI[:32])
    columns.add(down_HI[32:])
    shift_I = columns.shifts()
    assert (shift_I[::3] < -14).all() and not shift_I[1::3].any()
    before = shift_I.copy()
    drop_unfit_rows(up_IH, shift_I)
    assert np.array_equal(shift_I, before)
    for weights, by in ((up_IH, shift_I[:, None]), (down_HI, -shift_I)):
        moved = scaled(weights, by)
        assert np.array_equal(unpack_lossless(*moved.shape, packed(moved)), moved)
        assert np.array_equal(scaled(moved, -by), weights)  # nothing is lost


def test_neurons_whose_weights_would_be_no_numbers_stay() -> None:
    down_HI = normal(3, 32, 4)
    down_HI[:, 1] = scaled(down_HI[:, 1], np.array([-30]))
    columns = ColumnExponents(4)
    columns.add(down_HI)
    shift_I = columns.shifts()
    assert shift_I[1] < -20
    up_IH = normal(4, 4, 32)
    up_IH[1] = scaled(up_IH[1], np.array([-95]))  # smaller yet by 30, they would be denormal
    drop_unfit_rows(up_IH, shift_I)
    assert not shift_I.any()
    down_HI[5, 1] = 1  # a denormal has no exponent to be moved
    columns = ColumnExponents(4)
    columns.add(down_HI)
    assert not columns.shifts().any()
    assert not ColumnExponents(3).shifts().any()

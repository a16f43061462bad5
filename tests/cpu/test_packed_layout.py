"""Packed expert bytes: the layout byte by byte, round trips over any shape, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_kernels.packed_layout import (
    MatrixShape,
    PackedShape,
    Quantised,
    decode_scales,
    dequantise,
    encode_scales,
    pack_expert,
    pack_matrix,
    unpack_expert,
    unpack_matrix,
)
from cpu_kernels.weight_kind import KINDS, PACKED_KINDS, ROUNDED_KINDS, WeightKind, parse_kind

SIZES = st.integers(1, 200)


def random_matrix(rng: np.random.Generator, kind: WeightKind, rows: int, cols: int) -> Quantised:
    """Any codes and zero points, normal scales of both signs."""
    groups = -(-cols // kind.group)
    codes_NK = rng.integers(0, kind.max_code, (rows, cols), np.uint8, endpoint=True)
    values_NG = rng.standard_normal((rows, groups), np.float32)
    scales_NG = decode_scales(encode_scales(values_NG, kind.scales), kind.scales)
    zeros_NG = rng.integers(0, kind.max_code, (rows, groups), np.uint8, endpoint=True)
    return Quantised(codes_NK, scales_NG, zeros_NG if kind.has_zeros else None)


def same(left: Quantised, right: Quantised) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a is b if b is None else np.array_equal(a, b) for a, b in pairs)


def read_weight(kind: WeightKind, packed: Any, row: int, col: int, cols: int) -> float:
    """One weight read from the bytes as docs/packed-experts.md says, in plain Python."""
    groups = -(-cols // kind.group)
    padded = groups * kind.group
    block = bytes(packed[row // 16])
    r, g = row % 16, col // kind.group
    if kind.bits == 4:
        step, inside = divmod(col, 8)
        byte = block[(step * 16 + r) * 4 + inside % 4]
        code = byte >> 4 if inside >= 4 else byte & 15
    else:
        code = block[(col // 4 * 16 + r) * 4 + col % 4]
    scales_at = 16 * padded * kind.bits // 8
    place = scales_at + (g * 16 + r) * 2
    bits = int.from_bytes(block[place : place + 2], "little")
    scale = float(decode_scales(np.array([bits], np.uint16), kind.scales)[0])
    zero = block[scales_at + 32 * groups + g * 16 + r] if kind.has_zeros else kind.middle
    return scale * (code - zero)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(ROUNDED_KINDS), rows=SIZES, cols=SIZES)
def test_matrix_goes_round(seed: int, kind: WeightKind, rows: int, cols: int) -> None:
    matrix = random_matrix(np.random.default_rng(seed), kind, rows, cols)
    packed = pack_matrix(kind, *matrix)
    assert packed.dtype == np.uint8 and packed.flags.c_contiguous
    assert same(unpack_matrix(kind, rows, cols, packed), matrix)


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(ROUNDED_KINDS), rows=SIZES, cols=SIZES)
def test_every_byte_has_its_place(seed: int, kind: WeightKind, rows: int, cols: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = random_matrix(rng, kind, rows, cols)
    packed = pack_matrix(kind, *matrix)
    weights_NK = dequantise(kind, *matrix)
    for row, col in zip(rng.integers(0, rows, 20), rng.integers(0, cols, 20), strict=True):
        assert read_weight(kind, packed, int(row), int(col), cols) == weights_NK[row, col]


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(ROUNDED_KINDS), rows=SIZES, cols=SIZES)
def test_padding_is_exactly_zero(seed: int, kind: WeightKind, rows: int, cols: int) -> None:
    packed = pack_matrix(kind, *random_matrix(np.random.default_rng(seed), kind, rows, cols))
    shape = MatrixShape(kind, rows, cols)
    all_rows = 16 * shape.num_blocks
    padded = unpack_matrix(kind, all_rows, shape.padded_cols, packed)
    weights_NP = dequantise(kind, *padded)
    assert not padded.scales_NG[rows:].any() and not weights_NP[rows:].any()
    assert not weights_NP[:, cols:].any()
    used = shape.zero_offset + 16 * shape.groups * kind.has_zeros
    assert not packed[:, used:].any()


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(ROUNDED_KINDS), hidden=SIZES, width=SIZES)
def test_expert_goes_round_in_the_promised_size(
    seed: int, kind: WeightKind, hidden: int, width: int
) -> None:
    rng = np.random.default_rng(seed)
    gate, up = (random_matrix(rng, kind, width, hidden) for _ in range(2))
    down = random_matrix(rng, kind, hidden, width)
    shape = PackedShape(kind, hidden, width)
    blob = pack_expert(kind, gate, up, down)
    assert blob.shape == (shape.expert_bytes,)
    assert all(map(same, unpack_expert(shape, blob), (gate, up, down)))

    def num_bytes(rows: int, cols: int) -> int:
        groups = -(-cols // kind.group)
        per_group = 2 * kind.group * kind.bits + 32 + 16 * kind.has_zeros  # of 16 rows
        return -(-rows // 16) * (-(-groups * per_group // 64) * 64)

    assert shape.w2_offset == 2 * num_bytes(width, hidden)
    assert shape.expert_bytes == shape.w2_offset + num_bytes(hidden, width)


def test_gate_and_up_blocks_take_turns() -> None:
    kind, rng = parse_kind("w4g32"), np.random.default_rng(0)
    gate, up, down = (random_matrix(rng, kind, *shape) for shape in ((40, 64), (40, 64), (64, 40)))
    blob = pack_expert(kind, gate, up, down)
    turns = [pack_matrix(kind, *half)[block] for block in range(3) for half in (gate, up)]
    assert np.array_equal(blob, np.concatenate([*turns, pack_matrix(kind, *down).ravel()]))


def test_int4_nibbles_and_int8_bytes() -> None:
    codes_NK = np.zeros((16, 32), np.uint8)
    codes_NK[1, :8] = range(8)
    scales_NG = np.ones((16, 1), np.float32)
    int4 = pack_matrix(parse_kind("w4g32"), codes_NK, scales_NG, None)[0]
    assert int4[4:8].tolist() == [0x40, 0x51, 0x62, 0x73]
    int8 = pack_matrix(parse_kind("w8g32"), codes_NK, scales_NG, None)[0]
    assert int8[4:8].tolist() == [0, 1, 2, 3] and int8[68:72].tolist() == [4, 5, 6, 7]
    assert int8[512:544].view(np.float16).tolist() == [1.0] * 16


@pytest.mark.parametrize(
    ("name", "bits"),
    [("w4g128", 4.125), ("w4g128z", 4.1875), ("w4g32", 4.5), ("w8g128", 8.125), ("w8g32z", 8.75)],
)
def test_bits_per_weight(name: str, bits: float) -> None:
    assert MatrixShape(parse_kind(name), 4096, 14336).nbytes * 8 / (4096 * 14336) == bits


@pytest.mark.parametrize("kind", ROUNDED_KINDS, ids=lambda kind: kind.name)
def test_dequantise_is_exact(kind: WeightKind) -> None:
    matrix = random_matrix(np.random.default_rng(3), kind, 33, 150)
    zeros_NG = matrix.zeros_NG if matrix.zeros_NG is not None else np.float64(kind.middle)
    zeros_NG = np.broadcast_to(zeros_NG, matrix.scales_NG.shape).astype(np.float64)
    group_K = np.arange(150) // kind.group
    codes_NK = matrix.codes_NK - zeros_NG[:, group_K]
    expected_NK = codes_NK * matrix.scales_NG.astype(np.float64)[:, group_K]
    assert np.array_equal(dequantise(kind, *matrix), expected_NK)


def test_what_does_not_fit_is_refused() -> None:
    kind, asymmetric = parse_kind("w4g32"), parse_kind("w4g32z")
    good = random_matrix(np.random.default_rng(0), asymmetric, 17, 40)
    codes_NK, scales_NG, zeros_NG = good
    assert zeros_NG is not None
    for packed_as, changed in (
        (kind, good),
        (asymmetric, good._replace(zeros_NG=None)),
        (asymmetric, good._replace(zeros_NG=zeros_NG + np.uint8(16))),
        (asymmetric, good._replace(zeros_NG=zeros_NG[:, :1])),
        (asymmetric, good._replace(codes_NK=codes_NK + np.uint8(1))),
        (asymmetric, good._replace(codes_NK=codes_NK.astype(np.int8))),
        (asymmetric, good._replace(scales_NG=scales_NG[:, :1])),
        (asymmetric, good._replace(scales_NG=scales_NG.astype(np.float64))),
        (asymmetric, good._replace(scales_NG=scales_NG * np.float32(1.0001))),
        (asymmetric, good._replace(scales_NG=np.full_like(scales_NG, np.nan))),
        (asymmetric, good._replace(scales_NG=np.full_like(scales_NG, 1e6))),
    ):
        with pytest.raises(ValueError):
            pack_matrix(packed_as, *changed)
    with pytest.raises(ValueError, match="up must be"):
        pack_expert(asymmetric, good, good._replace(codes_NK=codes_NK[:5]), turned(good))


def turned(matrix: Quantised) -> Quantised:
    return matrix._replace(codes_NK=matrix.codes_NK.T)


def test_names_of_kinds() -> None:
    assert len(ROUNDED_KINDS) == len(set(ROUNDED_KINDS)) == 24 and len(KINDS) == 27
    assert all(parse_kind(kind.name) == kind for kind in PACKED_KINDS)
    assert parse_kind("w4g128z-bf16") == WeightKind("int4", 128, "bf16", has_zeros=True)
    assert [parse_kind(name).bits for name in ("f32", "bf16", "bf12", "w8g64")] == [32, 16, 12, 8]
    with pytest.raises(ValueError, match="choose one of f32, bf16, w4g32"):
        parse_kind("w4g256")


@pytest.mark.parametrize(
    "arguments",
    [
        ("int4",),
        ("int4", 256),
        ("bf16", 32),
        ("f32", 0, "bf16"),
        ("fp8", 32),
        ("int8", 32, "f32"),
        ("bf12",),
        ("bf12", 32, "bf16"),
        ("bf12", 64, "f16"),
        ("bf12", 64, "bf16", True),
    ],
)
def test_impossible_kinds_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        WeightKind(*arguments)

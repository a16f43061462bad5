"""Sizes of packed experts against the packer's, and what is refused."""

from dataclasses import replace

import pytest
import torch
from expert_case import packed_layout
from hypothesis import given
from hypothesis import strategies as st

from cpu_kernels.packed_layout import PackedShape
from cpu_kernels.weight_kind import PACKED_KINDS, WeightKind
from gpu_kernels.expert_weights import (
    DenseWeights,
    ExpertLayer,
    PackedLayout,
    PackedWeights,
    matrix_views,
)

SIZES = st.integers(1, 5000)


@given(st.sampled_from(PACKED_KINDS), SIZES, SIZES)
def test_offsets_equal_the_packers(kind: WeightKind, hidden: int, width: int) -> None:
    layout, shape = packed_layout(kind, hidden, width), PackedShape(kind, hidden, width)
    assert (layout.w2_offset, layout.expert_bytes) == (shape.w2_offset, shape.expert_bytes)
    for matrix in (shape.gate, shape.down):
        assert layout.block_bytes(matrix.cols) == matrix.block_bytes
        assert layout.scale_offset(matrix.cols) == matrix.scale_offset
        assert layout.zero_offset(matrix.cols) == matrix.zero_offset


def test_views_share_the_bytes() -> None:
    layout = PackedLayout(4, 32, False, torch.float16, 64, 48)
    blob_SB = torch.zeros(2, layout.expert_bytes + 64, dtype=torch.uint8)
    w13, w2 = matrix_views(PackedWeights(blob_SB, layout))
    assert w13.stride(0) == w2.stride(0) == blob_SB.stride(0)
    assert w2.data_ptr() == blob_SB.data_ptr() + layout.w2_offset


def test_bad_weights_are_refused() -> None:
    layout = PackedLayout(4, 32, False, torch.float16, 64, 48)
    blob_SB = torch.zeros(2, layout.expert_bytes, dtype=torch.uint8)
    for bad in (blob_SB[:, 1:], blob_SB.view(torch.int8), blob_SB[0], blob_SB[:0], blob_SB.T):
        with pytest.raises(AssertionError):
            PackedWeights(bad, layout)
    for field, value in (("bits", 3), ("group", 16), ("scale_dtype", torch.float32), ("width", 0)):
        with pytest.raises(AssertionError):
            replace(layout, **{field: value})
    w13_SFH, w2_SHI = torch.zeros(2, 96, 64), torch.zeros(2, 64, 48)
    layer = ExpertLayer(DenseWeights(w13_SFH, w2_SHI))
    assert (layer.num_slots, layer.hidden, layer.width) == (2, 64, 48)
    for bad_13, bad_2 in (
        (w13_SFH[:, 1:], w2_SHI),
        (w13_SFH.half(), w2_SHI),
        (w13_SFH.double(), w2_SHI.double()),
        (w13_SFH, w2_SHI.mT.contiguous().mT),
    ):
        with pytest.raises(AssertionError):
            DenseWeights(bad_13, bad_2)
    for biases in ({"b13_SF": torch.zeros(2, 48)}, {"b2_SH": torch.zeros(2, 64).half()}):
        with pytest.raises(AssertionError):
            ExpertLayer(layer.weights, **biases)

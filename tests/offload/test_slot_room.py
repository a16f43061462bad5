"""One block for the slots of all layers, whatever their sizes."""

import pytest
import torch

from offload.slot_room import ALIGNMENT, SlotRoom

CPU = torch.device("cpu")


def test_parts_lie_behind_each_other_where_kernels_can_read_them() -> None:
    shapes = (torch.uint8, 3, 7), (torch.float32, 5, 3), (torch.uint8, 0, 9), (torch.bfloat16, 1, 1)
    sizes = [rows * cols * dtype.itemsize for dtype, rows, cols in shapes]
    room = SlotRoom(sizes, CPU)
    parts = [room.take(dtype, rows, cols) for dtype, rows, cols in shapes]
    for number, part in enumerate(parts):
        part.fill_(number + 1)
    assert [part.unique().tolist() for part in parts] == [[1], [2], [], [4]]
    assert [tuple(part.shape) for part in parts] == [(3, 7), (5, 3), (0, 9), (1, 1)]
    assert all(part.is_contiguous() for part in parts)
    starts = [part.storage_offset() * part.itemsize for part in parts]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_a_store_without_slots_takes_nothing() -> None:
    room = SlotRoom([0, 0], CPU)
    assert room.take(torch.uint8, 0, 5).numel() == 0


def test_no_more_is_given_than_was_asked_for() -> None:
    room = SlotRoom([ALIGNMENT], CPU)
    room.take(torch.uint8, 1, ALIGNMENT)
    with pytest.raises(AssertionError, match="more is taken"):
        room.take(torch.uint8, 1, 1)

"""Counts of tokens on the device: prompt bit, output counts, saturation."""

import pytest
import torch
from paged_batch import DEVICE
from torch import Tensor

from gpu_kernels.token_counts import count_tokens, count_tokens_reference, fill_counts


def ids(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def test_a_row_tells_prompt_from_outputs() -> None:
    counts_SV = torch.full((2, 8), 77, dtype=torch.int16, device=DEVICE)
    fill_counts(counts_SV[1], ids(3, 5, 3), ids(5, 6, 6, 6))
    assert (counts_SV[1] & 0x7FFF).tolist() == [0, 0, 0, 0, 0, 1, 3, 0]
    assert (counts_SV[1] < 0).tolist() == [i in (3, 5) for i in range(8)]
    assert (counts_SV[0] == 77).all()
    fill_counts(counts_SV[1], ids(), ids())
    assert not counts_SV[1].any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_drawn_tokens_are_counted_in_their_slots(dtype: torch.dtype) -> None:
    counts_SV = torch.zeros(5, 300, dtype=torch.int16, device=DEVICE)[:, :200]
    fill_counts(counts_SV[4], ids(9, 10), ids(9))
    expected = counts_SV.clone()
    slot_B = ids(4, -1, 0, 2, 3, dtype=torch.int32)
    for token_B in (ids(9, 1, 199, -1, 0, dtype=dtype), ids(10, 1, 199, 5, 0, dtype=dtype)):
        count_tokens(counts_SV, slot_B, token_B)
        count_tokens_reference(expected, slot_B, token_B)
    assert torch.equal(counts_SV, expected)
    assert [int(counts_SV[s, t] & 0x7FFF) for s, t in ((4, 9), (4, 10), (0, 199), (2, 5))] == [
        *(2, 1, 2, 1)
    ]
    assert counts_SV[4, 9] < 0 and counts_SV[1].eq(0).all()


def test_a_full_count_stays() -> None:
    counts_SV = torch.tensor([[0x7FFF, -1, 0x7FFE]], dtype=torch.int16, device=DEVICE)
    for token in range(3):
        for _ in range(2):
            count_tokens(counts_SV, ids(0, dtype=torch.int32), ids(token))
    assert counts_SV.tolist() == [[0x7FFF, -1, 0x7FFF]]


def test_no_requests_and_bad_arguments() -> None:
    counts_SV = torch.zeros(2, 4, dtype=torch.int16, device=DEVICE)
    count_tokens(counts_SV, ids(dtype=torch.int32), ids())
    for bad in [
        (counts_SV.int(), ids(0, dtype=torch.int32), ids(1)),
        (counts_SV, ids(0), ids(1)),
        (counts_SV, ids(0, 1, dtype=torch.int32), ids(1)),
        (counts_SV.T, ids(0, dtype=torch.int32), ids(1)),
    ]:
        with pytest.raises(AssertionError):
            count_tokens(*bad)

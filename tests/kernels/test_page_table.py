"""The page table against the lists it was built from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged_batch import make_batch

from gpu_kernels.page_table import PageTable, gather_kv


@given(
    st.lists(st.integers(0, 70), max_size=6),
    st.sampled_from([1, 16, 64]),
    st.integers(0, 3),
)
def test_lengths_and_pages_survive(kv_lens: list[int], page_size: int, spare: int) -> None:
    counts = [-(-n // page_size) for n in kv_lens]
    page_lists = [[100 * i + p for p in range(count + spare)] for i, count in enumerate(counts)]
    table = PageTable.from_lists(page_lists, kv_lens, page_size=page_size)
    assert table.kv_len_B.tolist() == kv_lens
    assert table.indptr_B1.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
    expected = [p for row, n in zip(page_lists, counts, strict=True) for p in row[:n]]
    assert table.indices.tolist() == expected
    for count, last in zip(counts, table.last_page_len_B.tolist(), strict=True):
        assert (1 <= last <= page_size) if count else last == 0


def test_missing_page_is_refused() -> None:
    with pytest.raises(AssertionError, match="lacks pages"):
        PageTable.from_lists([[5]], [17], page_size=16)


def test_gather_returns_the_dense_keys_and_values() -> None:
    batch = make_batch([33, 0, 16], page_size=16)
    for request, (keys, values) in enumerate(batch.dense_kv):
        gathered = gather_kv(batch.kv_cache, batch.pages, request)
        assert torch.equal(gathered[0], keys) and torch.equal(gathered[1], values)

"""A table in host memory: what is registered with a driver that we make up, and its refusal."""

import gc

import pytest
import torch

from fiddler.errors import OutOfMemoryError
from offload.host_table import HostTable
from offload.pinning import PAGE
from tests.offload.pinning_cases import Owner, pinned


def test_the_whole_table_is_pinned_until_it_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    _, library = pinned(Owner(), monkeypatch)
    table = HostTable(1000, 100, torch.bfloat16)
    assert table.rows_VH.shape == (1000, 100) and table.rows_VH.is_contiguous()
    table.rows_VH.copy_(torch.arange(1000)[:, None])
    assert library.registered == {}
    table.pin()
    assert library.registered == {table.rows_VH.data_ptr(): -(-200_000 // PAGE) * PAGE}
    rows_VH = table.rows_VH
    table.release()
    del table
    gc.collect()
    assert library.registered == {} and rows_VH[999, 99] == torch.tensor(999).bfloat16()


def test_a_driver_that_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned(Owner(), monkeypatch, num_pages=10)
    table = HostTable(1000, 100, torch.bfloat16)
    with pytest.raises(
        OutOfMemoryError, match=r"does not pin 195 KiB .*: .*out of memory"
    ) as caught:
        table.pin()
    assert "--device cpu" in caught.value.hint

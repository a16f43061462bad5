"""Debug checks: silent when off, one clear sentence when a tensor holds a wild index."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_batch import DEVICE, make_batch

from gpu_kernels import checks
from gpu_kernels.attention_decode import attention_decode, plan_decode
from gpu_kernels.checks import check_page_table, check_range
from gpu_kernels.page_table import PageTable


@pytest.fixture(autouse=True)
def forget_the_environment() -> Iterator[None]:
    checks.enabled.cache_clear()
    yield
    checks.enabled.cache_clear()


@pytest.fixture
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIDDLER_DEBUG_KERNELS", "1")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_table() -> PageTable:
    return PageTable.from_lists([[3, 1], [], [4]], [17, 0, 16], device=DEVICE)


@pytest.mark.parametrize("value", [None, "0", ""])
def test_nothing_is_checked_unless_asked(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("FIDDLER_DEBUG_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("FIDDLER_DEBUG_KERNELS", value)
    check_range("ids", ints(99), 0, 1)
    check_page_table(make_table(), 1)
    monkeypatch.setenv("FIDDLER_DEBUG_KERNELS", "1")  # read once: too late
    check_range("ids", ints(99), 0, 1)


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize("wild", [-1, 7, 2**31 - 1])
def test_an_index_out_of_range_is_named(wild: int) -> None:
    check_range("slots_T", ints(0, 6), 0, 7)
    check_range("slots_T", ints(), 0, 7)
    with pytest.raises(ValueError, match=rf"^slots_T must lie in 0\.\.6, but holds {wild}$"):
        check_range("slots_T", ints(3, wild, 2), 0, 7)


@pytest.mark.usefixtures("switched_on")
def test_a_good_page_table_passes() -> None:
    check_page_table(make_table(), 5)
    padded = torch.cat([make_table().indices, ints(-1, 10**6)])
    check_page_table(replace(make_table(), indices=padded), 5)
    check_page_table(PageTable.from_lists([], [], device=DEVICE), 0)


@pytest.mark.usefixtures("switched_on")
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"indptr_B1": ints(1, 2, 2, 3)}, "indptr_B1 must begin with 0, but holds 1"),
        ({"indptr_B1": ints(0, 2, 1, 3)}, "indptr_B1 must never decrease"),
        ({"indptr_B1": ints(0, 2, 2, 4)}, "indptr_B1 must end within the 3 indices"),
        ({"indices": ints(3, 1, 5)}, "indices must lie in 0..4, but holds 5"),
        ({"indices": ints(3, -2, 4)}, "indices must lie in 0..4, but holds -2"),
        ({"last_page_len_B": ints(1, 1, 16)}, "last_page_len_B must be 0..0 for a request of 0"),
        ({"last_page_len_B": ints(0, 0, 16)}, "last_page_len_B must be 1..16 for a request of 2"),
        ({"last_page_len_B": ints(1, 0, 17)}, "last_page_len_B must be 1..16 for a request of 1"),
    ],
)
def test_what_is_wrong_with_a_page_table_is_said(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^pages.{sentence}"):
        check_page_table(replace(make_table(), **changes), 5)


@pytest.mark.usefixtures("switched_on")
def test_attention_refuses_a_wild_page_before_it_launches() -> None:
    batch = make_batch([20, 30])
    plan = plan_decode(2, 4, 2, 16, device=DEVICE, dtype=torch.float32)
    batch.pages.indices[1] = len(batch.kv_cache)
    with pytest.raises(ValueError, match=r"pages.indices must lie in 0\.\.6"):
        attention_decode(batch.q_THD, batch.kv_cache, batch.pages, plan, sm_scale=1.0)

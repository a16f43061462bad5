"""Rows of a table against torch's embedding."""

import pytest
import torch
from paged_batch import DEVICE, frobenius_error
from torch import Tensor

from gpu_kernels import checks
from gpu_kernels.embedding import embedding, embedding_reference
from offload.host_table import HostTable

IDS = [3, 0, 9, 3]


def make_table(hidden: int, dtype: torch.dtype = torch.float32, vocab: int = 10) -> Tensor:
    rng = torch.Generator().manual_seed(hidden)
    return torch.randn(vocab, hidden, generator=rng).to(DEVICE, dtype)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("hidden", "dtype"), [(1, torch.float32), (64, torch.bfloat16)])
def test_rows_are_those_of_torch(hidden: int, dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    table_VH = make_table(hidden, dtype)
    ids_T = torch.tensor(IDS, dtype=ids_dtype, device=DEVICE)
    assert torch.equal(embedding(ids_T, table_VH), torch.nn.functional.embedding(ids_T, table_VH))
    assert torch.equal(embedding_reference(ids_T, table_VH), table_VH[ids_T.long()].float())


@pytest.mark.parametrize("hidden", [1024, 2500])
def test_wide_rows_and_slices_of_tables(hidden: int) -> None:
    fused = make_table(2 * hidden)
    ids_T = torch.tensor(IDS, device=DEVICE)
    expected = fused[ids_T, 7 : hidden + 7]
    out = torch.full((4, hidden), float("nan"), device=DEVICE)
    assert embedding(ids_T, fused[:, 7 : hidden + 7], out=out) is out
    assert torch.equal(out, expected)
    every_other = ids_T.repeat_interleave(2)[::2]
    assert torch.equal(embedding(every_other, fused[:, 7 : hidden + 7]), expected)


def test_a_scaled_row_is_rounded_once() -> None:
    table_VH = make_table(100, torch.float16)
    ids_T = torch.tensor(IDS, device=DEVICE)
    exact = embedding_reference(ids_T, table_VH, scale=10.1)
    assert torch.equal(embedding(ids_T, table_VH, scale=10.1), exact.half())


def test_an_id_outside_the_table_gives_nan_and_harms_nothing() -> None:
    table_VH = make_table(20)
    ids_T = torch.tensor([-1, 4, 10, -(2**40)], device=DEVICE)
    rows = embedding(ids_T, table_VH)
    assert torch.equal(rows[1], table_VH[4])
    assert rows[[0, 2, 3]].isnan().all()


def test_debug_mode_refuses_an_id_outside_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "enabled", lambda: True)
    with pytest.raises(ValueError, match=r"ids_T must lie in 0\.\.9, but holds 10"):
        embedding(torch.tensor([10, 0], device=DEVICE), make_table(4))


def test_no_ids() -> None:
    ids_T = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert embedding(ids_T, make_table(8)).shape == (0, 8)


def test_bad_arguments() -> None:
    table_VH, ids_T = make_table(8), torch.tensor(IDS, device=DEVICE)
    for bad_ids, bad_table, bad_out in [
        (ids_T.float(), table_VH, None),
        (ids_T[None], table_VH, None),
        (ids_T, table_VH.T, None),
        (ids_T, table_VH.long(), None),
        (ids_T, table_VH, table_VH[:3]),
        (ids_T, table_VH, table_VH[:4].half()),
    ]:
        with pytest.raises(AssertionError):
            embedding(bad_ids, bad_table, out=bad_out)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [100, 2048, 4096, 7168])
def test_half_dtypes_on_the_gpu(hidden: int, dtype: torch.dtype) -> None:
    table_VH = make_table(hidden, dtype, vocab=1000)
    ids_T = torch.randint(1000, (513,), device=DEVICE)
    assert torch.equal(embedding(ids_T, table_VH), table_VH[ids_T])
    exact = embedding_reference(ids_T, table_VH, scale=3.3)
    assert frobenius_error(embedding(ids_T, table_VH, scale=3.3), exact) <= 5e-3


@pytest.mark.gpu
def test_a_table_of_pageable_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        embedding(torch.tensor(IDS, device=DEVICE), make_table(8).cpu())


@pytest.mark.gpu
def test_rows_come_from_pinned_host_memory_in_a_graph() -> None:
    """As a model's do whose input embedding stays in host memory."""
    table = HostTable(151_936, 2048, torch.bfloat16)
    table.rows_VH.copy_(make_table(2048, torch.bfloat16, vocab=1).cpu())
    ids_V = torch.arange(151_936)
    table.rows_VH[:, 0], table.rows_VH[:, 2047] = ids_V // 256, ids_V % 256  # no two rows are equal
    table.pin()
    ids_T = torch.tensor([0, 151_935, 7, 7], device=DEVICE)
    assert torch.equal(embedding(ids_T, table.rows_VH).cpu(), table.rows_VH[ids_T.cpu()])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out_TH = embedding(ids_T, table.rows_VH)
    for first in (1, 70_000):
        ids_T.copy_(torch.arange(first, first + 4))
        graph.replay()
        assert torch.equal(out_TH.cpu(), table.rows_VH[first : first + 4])
    del graph
    table.release()

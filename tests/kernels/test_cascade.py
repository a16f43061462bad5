"""Cascade attention equals attention over the whole caches."""

from itertools import pairwise

import pytest
import torch
from paged_batch import DEVICE, PagedBatch, dense_oracle, frobenius_error, make_batch, max_error

from gpu_kernels.cascade import attention_cascade, plan_cascade
from gpu_kernels.page_table import PageTable

PAGE = 16


def grouped_batch(
    group_sizes: list[int],
    prefix_pages: list[int],
    suffix_lens: list[int],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
) -> tuple[PagedBatch, PageTable, PageTable]:
    """A batch whose groups' first pages are the same ones, and the tables of both levels."""
    group_of = [g for g, size in enumerate(group_sizes) for _ in range(size)]
    kv_lens = [prefix_pages[g] * PAGE + n for g, n in zip(group_of, suffix_lens, strict=True)]
    batch = make_batch(kv_lens, dtype=dtype, heads=heads, head_dim=head_dim)
    indptr = batch.pages.indptr_B1.tolist()
    rows = [batch.pages.indices[a:b].tolist() for a, b in pairwise(indptr)]
    first_of = [group_of.index(g) if size else None for g, size in enumerate(group_sizes)]
    for request, group in enumerate(group_of):
        first, count = first_of[group], prefix_pages[group]
        if request != first:
            batch.kv_cache[rows[request][:count]] = torch.nan  # nobody may read these
        batch.dense_kv[request][0][: count * PAGE] = batch.dense_kv[first or 0][0][: count * PAGE]
        batch.dense_kv[request][1][: count * PAGE] = batch.dense_kv[first or 0][1][: count * PAGE]
    prefixes = [rows[f][: prefix_pages[g]] if f is not None else [] for g, f in enumerate(first_of)]
    suffixes = [row[prefix_pages[g] :] for row, g in zip(rows, group_of, strict=True)]
    return (
        batch,
        PageTable.from_lists(prefixes, [len(p) * PAGE for p in prefixes], device=DEVICE),
        PageTable.from_lists(suffixes, suffix_lens, device=DEVICE),
    )


def run(
    batch: PagedBatch, tables: tuple[PageTable, PageTable], group_sizes: list[int]
) -> torch.Tensor:
    plan = plan_cascade(
        group_sizes,
        batch.q_THD.shape[1],
        batch.kv_cache.shape[3],
        batch.q_THD.shape[2],
        device=DEVICE,
        dtype=batch.q_THD.dtype,
    )
    plan.out_BHD.fill_(torch.nan)
    return attention_cascade(batch.q_THD, batch.kv_cache, *tables, plan, sm_scale=batch.sm_scale)


def test_equals_attention_over_everything() -> None:
    sizes = [3, 1, 0, 2]
    batch, *tables = grouped_batch(sizes, [5, 2, 0, 0], [1, 20, 16, 7, 40, 1])
    actual = run(batch, (tables[0], tables[1]), sizes)
    assert max_error(actual, dense_oracle(batch)) <= 1e-5


@pytest.mark.gpu
def test_bfloat16_on_the_gpu() -> None:
    sizes = [40, 3]
    batch, *tables = grouped_batch(
        sizes,
        [130, 1],
        [1 + 5 * n for n in range(43)],
        dtype=torch.bfloat16,
        heads=(32, 4),
        head_dim=128,
    )
    actual = run(batch, (tables[0], tables[1]), sizes)
    assert frobenius_error(actual, dense_oracle(batch)) <= 5e-3
    assert torch.equal(actual, run(batch, (tables[0], tables[1]), sizes))

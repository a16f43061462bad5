"""Cascade attention against the same requests without sharing.

Run: PYTHONPATH=. python -m scripts.bench.kernels.cascade
"""

from __future__ import annotations

import torch

from gpu_kernels.attention_decode import attention_decode, plan_decode
from gpu_kernels.cascade import attention_cascade, plan_cascade
from gpu_kernels.page_table import PageTable
from scripts.bench.kernels.paged_case import HEAD_DIM, NUM_HEADS, PAGE_SIZE, SM_SCALE, make_queries
from scripts.bench.kernels.timing import graph_ms, relative_error
from scripts.bench.rows import Row, at_least, table

PREFIX, BATCH, SUFFIX, NUM_KV_HEADS = 32_768, 64, 128, 4


def rows() -> list[Row]:
    prefix_pages, suffix_pages = PREFIX // PAGE_SIZE, SUFFIX // PAGE_SIZE
    order = torch.randperm(prefix_pages + BATCH * suffix_pages).tolist()
    prefix, rest = order[:prefix_pages], order[prefix_pages:]
    own = [rest[n * suffix_pages : (n + 1) * suffix_pages] for n in range(BATCH)]
    shape = (len(order), 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    kv_cache = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    q_BHD = make_queries(BATCH)
    whole = PageTable.from_lists(
        [prefix + row for row in own], [PREFIX + SUFFIX] * BATCH, device="cuda"
    )
    level_0 = PageTable.from_lists([prefix], [PREFIX], device="cuda")
    level_1 = PageTable.from_lists(own, [SUFFIX] * BATCH, device="cuda")
    heads = (NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
    cascade_plan = plan_cascade([BATCH], *heads, device="cuda")
    plan = plan_decode(BATCH, *heads, device="cuda")

    def alone() -> torch.Tensor:
        return attention_decode(q_BHD, kv_cache, whole, plan, sm_scale=SM_SCALE)

    def shared() -> torch.Tensor:
        return attention_cascade(q_BHD, kv_cache, level_0, level_1, cascade_plan, sm_scale=SM_SCALE)

    error = relative_error(shared(), alone())
    assert error <= 5e-3, f"relative error {error:.1e}"
    alone_ms, shared_ms = graph_ms(alone), graph_ms(shared)
    name = f"cascade, prefix {PREFIX}, {BATCH} suffixes of {SUFFIX}, against not sharing"
    speeds = (1e3 * BATCH / shared_ms, 1e3 * BATCH / alone_ms)
    return [at_least(name, speeds[0], "tok/s", speeds[1], alone_ms / shared_ms, 4.0)]


def main() -> None:
    torch.manual_seed(0)
    print(table(rows()))


if __name__ == "__main__":
    main()

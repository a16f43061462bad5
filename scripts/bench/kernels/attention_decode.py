"""Decode attention: bytes of K and V per second, against a plain read.

Run: PYTHONPATH=. python -m scripts.bench.kernels.attention_decode
"""

from __future__ import annotations

import time

import torch

from gpu_kernels.attention_decode import (
    attention_decode,
    attention_decode_reference,
    max_decode_programs,
    plan_decode,
)
from scripts.bench.kernels.paged_case import (
    HEAD_DIM,
    NUM_KV_HEADS,
    PAGE_SIZE,
    SM_SCALE,
    make_cache,
    make_queries,
)
from scripts.bench.kernels.timing import Peaks, measure_peaks, print_header, print_row


def zipf_lengths(num_requests: int, total: int) -> list[int]:
    """Lengths proportional to 1 / rank that sum to about ``total``."""
    weights = [1 / (rank + 1) for rank in range(num_requests)]
    return [max(1, int(total * w / sum(weights))) for w in weights]


CASES = {
    "64 requests of 8192": [8192] * 64,
    "64 requests, Zipf, same total": zipf_lengths(64, 64 * 8192),
    "16 requests of 4096": [4096] * 16,
    "1 request of 131072": [131_072],
    "1 request of 4096": [4096],
    "1 request of 512": [512],
}


def bench_case(name: str, kv_lens: list[int], peaks: Peaks) -> None:
    kv_cache, pages = make_cache(kv_lens)
    q_BHD = make_queries(len(kv_lens))
    start = time.perf_counter()
    programs = max_decode_programs("cuda")
    host_plan = plan_decode(kv_lens, NUM_KV_HEADS, page_size=PAGE_SIZE, max_programs=programs)
    plan_us = (time.perf_counter() - start) * 1e6
    plan = host_plan.to("cuda")

    def run() -> torch.Tensor:
        return attention_decode(q_BHD, kv_cache, pages, plan, sm_scale=SM_SCALE)

    expected = attention_decode_reference(q_BHD, kv_cache, pages, sm_scale=SM_SCALE)
    error = ((run() - expected).norm() / expected.norm()).item()
    assert error <= 5e-3, f"{name}: relative error {error:.1e}"
    num_bytes = sum(kv_lens) * 2 * NUM_KV_HEADS * HEAD_DIM * 2 + 2 * 2 * q_BHD.numel()
    print_row(name, run, num_bytes, peaks)
    print(f"    plan {plan_us:.0f} us, {plan.num_work} work items of {plan.chunk_size} tokens")


def main() -> None:
    torch.manual_seed(0)
    peaks = measure_peaks()
    print_header(peaks)
    for name, kv_lens in CASES.items():
        bench_case(name, kv_lens, peaks)


if __name__ == "__main__":
    main()

"""Prefill attention: arithmetic rate against a bf16 matrix product of torch.

Run: PYTHONPATH=. python -m scripts.bench.kernels.attention_prefill
"""

from __future__ import annotations

import torch

from gpu_kernels.attention_prefill import attention_prefill, attention_prefill_reference
from scripts.bench.kernels.paged_case import (
    HEAD_DIM,
    NUM_HEADS,
    SM_SCALE,
    make_cache,
    make_queries,
)
from scripts.bench.kernels.timing import median_ms

CASES = {
    "prompt of 512": ([512], [512]),
    "prompt of 2048": ([2048], [2048]),
    "prompt of 8192": ([8192], [8192]),
    "chunk of 512 after 7680": ([8192], [512]),
    "chunk of 512 and 32 decode rows of 4096": ([2048] + [4096] * 32, [512] + [1] * 32),
}


def matmul_tflops(size: int = 8192) -> float:
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device="cuda")
    return 2 * size**3 / median_ms(lambda: a @ b) / 1e9


def bench_case(name: str, kv_lens: list[int], qo_lens: list[int], peak_tflops: float) -> None:
    kv_cache, pages = make_cache(kv_lens)
    q_THD = make_queries(sum(qo_lens))
    qo_indptr_B1 = torch.tensor([0, *qo_lens]).cumsum(0).to("cuda", torch.int32)

    def run() -> torch.Tensor:
        return attention_prefill(
            q_THD, kv_cache, pages, qo_indptr_B1, sm_scale=SM_SCALE, max_qo_len=max(qo_lens)
        )

    if max(kv_lens) * max(qo_lens) <= 8192 * 2048:  # the reference holds all logits in float32
        expected = attention_prefill_reference(
            q_THD, kv_cache, pages, qo_indptr_B1, sm_scale=SM_SCALE
        )
        error = ((run() - expected).norm() / expected.norm()).item()
        assert error <= 5e-3, f"{name}: relative error {error:.1e}"
    pairs = sum(qo * kv - qo * (qo - 1) // 2 for kv, qo in zip(kv_lens, qo_lens, strict=True))
    milliseconds = median_ms(run)
    tflops = 4 * NUM_HEADS * HEAD_DIM * pairs / milliseconds / 1e9
    print(f"{name:<46}{milliseconds * 1e3:>10.1f}{tflops:>9.1f}{tflops / peak_tflops:>11.2f}")


def main() -> None:
    torch.manual_seed(0)
    peak_tflops = matmul_tflops()
    print(f"{torch.cuda.get_device_name()}: bf16 matrix product {peak_tflops:.0f} TFLOP/s")
    print(f"{'name':<46}{'us':>10}{'TFLOP/s':>9}{'of matmul':>11}")
    for name, (kv_lens, qo_lens) in CASES.items():
        bench_case(name, kv_lens, qo_lens, peak_tflops)


if __name__ == "__main__":
    main()

"""Norms, SwiGLU, rotary embedding with the cache write: bytes per second against a copy.

Run: PYTHONPATH=. python -m scripts.bench.kernels.elementwise
"""

from __future__ import annotations

import torch

from gpu_kernels.kv_append import rope_and_append
from gpu_kernels.rmsnorm import add_rms_norm, rms_norm
from gpu_kernels.silu_mul import silu_mul
from scripts.bench.kernels.paged_case import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE
from scripts.bench.kernels.timing import Peaks, measure_peaks, print_header, print_row

HIDDEN, EXPERT_WIDTH = 4096, 14336


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def bench_norms(num_tokens: int, peaks: Peaks) -> None:
    x_TH, residual_TH = random_rows(2, num_tokens, HIDDEN)
    weight_H = random_rows(HIDDEN)
    num_bytes = x_TH.numel() * 2
    name = f"{num_tokens} x {HIDDEN}"
    print_row(f"rms_norm {name}", lambda: rms_norm(x_TH, weight_H, 1e-6), 2 * num_bytes, peaks)
    print_row(
        f"add_rms_norm {name}",
        lambda: add_rms_norm(x_TH, residual_TH, weight_H, 1e-6),
        4 * num_bytes,
        peaks,
    )


def bench_silu_mul(num_tokens: int, peaks: Peaks) -> None:
    gate_up_T2I = random_rows(num_tokens, 2 * EXPERT_WIDTH)
    num_bytes = num_tokens * EXPERT_WIDTH * 2 * 3
    name = f"silu_mul {num_tokens} x {EXPERT_WIDTH}"
    print_row(name, lambda: silu_mul(gate_up_T2I), num_bytes, peaks)


def bench_append(num_tokens: int, peaks: Peaks) -> None:
    sizes = [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
    q_THD, k_TKD, v_TKD = random_rows(num_tokens, sum(sizes), HEAD_DIM).split(sizes, dim=1)
    kv_cache = random_rows(num_tokens // PAGE_SIZE + 1, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.randn(2, num_tokens, HEAD_DIM // 2, device="cuda")
    positions_T = torch.arange(num_tokens, device="cuda")
    norms = random_rows(2, HEAD_DIM)
    run_arguments = (q_THD, k_TKD, v_TKD, *tables, positions_T, positions_T, kv_cache, *norms)
    num_bytes = num_tokens * sum(sizes) * HEAD_DIM * 2 * 2 + tables.numel() * 4
    print_row(
        f"rope_and_append {num_tokens}, normed",
        lambda: rope_and_append(*run_arguments),
        num_bytes,
        peaks,
    )


def main() -> None:
    torch.manual_seed(0)
    peaks = measure_peaks()
    print_header(peaks)
    for num_tokens in (1, 512, 16384):
        bench_norms(num_tokens, peaks)
        bench_silu_mul(num_tokens, peaks)
        bench_append(num_tokens, peaks)


if __name__ == "__main__":
    main()

"""Norms, SwiGLU, rotary embedding with the cache write: bytes per second against a copy.

Run: PYTHONPATH=. python -m scripts.bench.kernels.elementwise
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gpu_kernels.kv_append import rope_and_append
from gpu_kernels.rmsnorm import add_rms_norm, rms_norm
from gpu_kernels.silu_mul import silu_mul
from scripts.bench.kernels.paged_case import HEAD_DIM, NUM_HEADS, PAGE_SIZE
from scripts.bench.kernels.timing import measure_peaks, median_ms
from scripts.bench.rows import Row, at_least, table

HIDDEN, EXPERT_WIDTH, NUM_KV_HEADS = 4096, 14336, 4
NUM_TOKENS = 16384
LEAST = 0.8  # of a copy


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def norm_cases() -> dict[str, tuple[Callable[[], object], int]]:
    x_TH, residual_TH = random_rows(2, NUM_TOKENS, HIDDEN)
    weight_H = random_rows(HIDDEN)
    num_bytes = x_TH.numel() * 2
    return {
        f"rms_norm {NUM_TOKENS} x {HIDDEN}": (
            lambda: rms_norm(x_TH, weight_H, 1e-6),
            2 * num_bytes,
        ),
        f"add_rms_norm {NUM_TOKENS} x {HIDDEN}": (
            lambda: add_rms_norm(x_TH, residual_TH, weight_H, 1e-6),
            4 * num_bytes,
        ),
    }


def silu_mul_cases() -> dict[str, tuple[Callable[[], object], int]]:
    gate_up_TF = random_rows(NUM_TOKENS, 2 * EXPERT_WIDTH)
    num_bytes = NUM_TOKENS * EXPERT_WIDTH * 2 * 3
    return {f"silu_mul {NUM_TOKENS} x {EXPERT_WIDTH}": (lambda: silu_mul(gate_up_TF), num_bytes)}


def append_cases() -> dict[str, tuple[Callable[[], object], int]]:
    num_rows = NUM_HEADS + 2 * NUM_KV_HEADS
    x_TRD = random_rows(NUM_TOKENS, num_rows, HEAD_DIM)
    q_THD, k_TKD, v_TKD = torch.split(x_TRD, [NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    kv_cache = random_rows(NUM_TOKENS // PAGE_SIZE + 1, 2, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    tables = torch.randn(2, NUM_TOKENS, HEAD_DIM // 2, device="cuda")
    positions_T = torch.arange(NUM_TOKENS, device="cuda")
    norms = random_rows(2, HEAD_DIM)
    arguments = (q_THD, k_TKD, v_TKD, *tables, positions_T, positions_T, kv_cache, *norms)
    num_bytes = 2 * 2 * x_TRD.numel() + 4 * tables.numel()
    return {
        f"rope_and_append {NUM_TOKENS}, normed": (lambda: rope_and_append(*arguments), num_bytes)
    }


def rows() -> list[Row]:
    """Every case of this file, measured."""
    limit = measure_peaks().copy_gbps
    found = []
    for cases in (norm_cases, silu_mul_cases, append_cases):
        for name, (run, num_bytes) in cases().items():
            value = num_bytes / median_ms(run) / 1e6
            found.append(at_least(f"{name}, of a copy", value, "GB/s", limit, value / limit, LEAST))
    return found


def main() -> None:
    print(torch.cuda.get_device_name())
    print(table(rows()))


if __name__ == "__main__":
    main()

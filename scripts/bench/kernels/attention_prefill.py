"""Prefill attention: its arithmetic rate against a product of large matrices and against SDPA.

Run: PYTHONPATH=. python -m scripts.bench.kernels.attention_prefill [--tune]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_kernels.attention_prefill import attention_prefill, attention_prefill_reference
from scripts.bench.kernels.paged_case import (
    HEAD_DIM,
    NUM_HEADS,
    SM_SCALE,
    make_cache,
    make_queries,
)
from scripts.bench.kernels.timing import graph_ms, matmul_tflops, relative_error
from scripts.bench.kernels.tuner import try_all
from scripts.bench.rows import Row, at_least, table

NUM_KV_HEADS = 4
PROMPTS = {4096: 0.35, 16384: 0.45}  # tokens: least share of a matrix product's rate
CHUNKS = {"chunk of 512 after 7680": ([8192], [512]), "prompt of 512": ([512], [512])}


def runner(kv_lens: list[int], qo_lens: list[int]) -> Callable[[], torch.Tensor]:
    kv_cache, pages = make_cache(kv_lens, NUM_KV_HEADS)
    q_THD = make_queries(sum(qo_lens))
    qo_indptr_B1 = torch.tensor([0, *qo_lens]).cumsum(0).to("cuda", torch.int32)

    def run() -> torch.Tensor:
        return attention_prefill(
            q_THD, kv_cache, pages, qo_indptr_B1, sm_scale=SM_SCALE, max_qo_len=max(qo_lens)
        )

    if max(kv_lens) * max(qo_lens) <= 4096 * 4096:  # the reference holds all logits in float32
        expected = attention_prefill_reference(
            q_THD, kv_cache, pages, qo_indptr_B1, sm_scale=SM_SCALE
        )
        error = relative_error(run(), expected)
        assert error <= 5e-3, f"relative error {error:.1e}"
    return run


def flops(kv_lens: list[int], qo_lens: list[int]) -> int:
    pairs = sum(qo * kv - qo * (qo - 1) // 2 for kv, qo in zip(kv_lens, qo_lens, strict=True))
    return 4 * NUM_HEADS * HEAD_DIM * pairs


def sdpa_ms(tokens: int) -> float:
    """torch's flash attention on the same dense problem, its keys and values in one piece."""
    q_1HTD = torch.randn(1, NUM_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    k_1KTD, v_1KTD = torch.randn(
        2, 1, NUM_KV_HEADS, tokens, HEAD_DIM, dtype=torch.bfloat16, device="cuda"
    )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return graph_ms(
            lambda: F.scaled_dot_product_attention(
                q_1HTD, k_1KTD, v_1KTD, is_causal=True, enable_gqa=True
            )
        )


def rows() -> list[Row]:
    found, peak = [], matmul_tflops()
    cases = {f"prompt of {n}": ([n], [n]) for n in PROMPTS} | CHUNKS
    for name, (kv_lens, qo_lens) in cases.items():
        milliseconds = graph_ms(runner(kv_lens, qo_lens))
        tflops = flops(kv_lens, qo_lens) / milliseconds / 1e9
        target = PROMPTS.get(kv_lens[0], 0.0) if kv_lens == qo_lens else 0.0
        title = f"prefill attention, {name}"
        found.append(
            at_least(f"{title}, of a matrix product", tflops, "TF/s", peak, tflops / peak, target)
        )
        if kv_lens == qo_lens:
            flash_ms = sdpa_ms(kv_lens[0])
            flash = flops(kv_lens, qo_lens) / flash_ms / 1e9
            target = 0.9 if kv_lens[0] in PROMPTS else 0.0
            ratio = flash_ms / milliseconds
            found.append(
                at_least(f"{title}, of torch's flash", tflops, "TF/s", flash, ratio, target)
            )
    return found


def tune() -> None:
    for tokens in (4096, 16384):
        case = ([tokens], [tokens])
        for milliseconds, config in try_all(
            "attention_prefill",
            functools.partial(runner, *case),
            BLOCK_M=(64, 128),
            BLOCK_N=(32, 64, 128),
            num_stages=(2, 3, 4, 5),
            num_warps=(4, 8),
        )[:5]:
            print(tokens, f"{flops(*case) / milliseconds / 1e9:.0f} TFLOP/s", config)


def main() -> None:
    torch.manual_seed(0)
    if "--tune" in sys.argv:
        tune()
    else:
        print(table(rows()))


if __name__ == "__main__":
    main()

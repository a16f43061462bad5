"""Decode attention: the time of a plain read of the same bytes, as a share of the kernel's.

Run: PYTHONPATH=. python -m scripts.bench.kernels.attention_decode [--tune]
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import torch

from gpu_kernels.attention_decode import attention_decode_reference
from gpu_kernels.kv_quant import INT4
from scripts.bench.kernels.paged_case import SM_SCALE, DecodeCase, decode_case, zipf_lengths
from scripts.bench.kernels.timing import graph_ms, read_ms, relative_error
from scripts.bench.kernels.tuner import try_all
from scripts.bench.rows import Row, at_least, table

TOTAL_BYTES = 256 << 20
BATCHES = (1, 16, 64)
# What codes are to gain over bf16. int4 has 3.8 times fewer bytes, not yet timed on a GPU.
KINDS = {torch.int8: 1.6, torch.float8_e4m3fn: 1.6, INT4: 2.4}


def lengths(batch: int, num_kv_heads: int) -> list[int]:
    """Equal lengths that hold 256 MiB of bf16 keys and values."""
    return [TOTAL_BYTES // (2 * 2 * num_kv_heads * 128) // batch] * batch


def check(case: DecodeCase) -> None:
    """The kernel is right on this case, some requests of it where there are many."""
    actual = case.runner()()
    few = min(4, len(case.q_BHD))
    pages = replace(
        case.pages,
        indptr_B1=case.pages.indptr_B1[: few + 1],
        last_page_len_B=case.pages.last_page_len_B[:few],
    )
    expected = attention_decode_reference(
        case.q_BHD[:few], case.kv_cache, pages, sm_scale=SM_SCALE, kv_scales=case.kv_scales
    )
    error = relative_error(actual[:few], expected)
    assert error <= 5e-3, f"relative error {error:.1e}"


def read_share(case: DecodeCase) -> tuple[float, float, float]:
    """(milliseconds, GB/s, time of a plain read of the same bytes in units of ours)."""
    milliseconds = graph_ms(case.runner())
    return (
        milliseconds,
        case.num_bytes / milliseconds / 1e6,
        read_ms(case.num_bytes) / milliseconds,
    )


def rows() -> list[Row]:
    found: list[Row] = []
    for num_kv_heads, batch in itertools.product((4, 8), BATCHES):
        kv_lens = lengths(batch, num_kv_heads)
        name = f"decode attention, {num_kv_heads} KV heads, {batch} x {kv_lens[0]}"
        case = decode_case(kv_lens, num_kv_heads)
        check(case)
        bf16_ms, gbps, share = read_share(case)
        limit = case.num_bytes / read_ms(case.num_bytes) / 1e6
        found.append(at_least(f"{name}, bf16, of a read", gbps, "GB/s", limit, share, 0.85))
        for dtype, target in KINDS.items():
            small = decode_case(kv_lens, num_kv_heads, dtype)
            check(small)
            small_ms, gbps, _ = read_share(small)
            kind = "int4" if dtype == INT4 else str(dtype).removeprefix("torch.")
            found.append(
                at_least(
                    f"{name}, {kind}, of bf16's speed",
                    1e3 * batch / small_ms,
                    "tok/s",
                    1e3 * batch / bf16_ms,
                    bf16_ms / small_ms,
                    target,
                )
            )
        if batch > 1:
            skewed = decode_case(zipf_lengths(batch, sum(kv_lens)), num_kv_heads)
            check(skewed)
            skewed_ms = graph_ms(skewed.runner()) * case.num_bytes / skewed.num_bytes
            found.append(
                at_least(
                    f"{name}, Zipf lengths, of equal ones' speed",
                    1 / skewed_ms,
                    "1/ms",
                    1 / bf16_ms,
                    bf16_ms / skewed_ms,
                    0.9,
                )
            )
    return found


def tune() -> None:
    """Print the best configurations for each type of cache, and their shares of a read."""
    for dtype, num_kv_heads, batch in itertools.product((torch.bfloat16, *KINDS), (4, 8), (1, 64)):
        case = decode_case(lengths(batch, num_kv_heads), num_kv_heads, dtype)
        floor = read_ms(case.num_bytes)
        for milliseconds, config in try_all(
            "attention_decode",
            case.runner,
            BLOCK_N=(32, 64, 128),
            num_stages=(5, 7, 9),
            num_warps=(4, 8),
            per_sm=(1, 2, 3, 4),
        )[:4]:
            print(dtype, num_kv_heads, batch, f"{floor / milliseconds:.3f}", config)


def main() -> None:
    torch.manual_seed(0)
    if "--tune" in sys.argv:
        tune()
    else:
        print(table(rows()))


if __name__ == "__main__":
    main()

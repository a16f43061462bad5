"""Compile the Triton kernels for a GPU that need not be here, and tell what each takes of it.

    python -m scripts.compile_kernels [--sm 90] [--only attention ...]

Prints registers, bytes spilled to local memory and shared memory of every launch in ``cases``. The
exit code is 1 if one of them needs more shared memory than a block may have there.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gpu_kernels import device
from gpu_kernels.attention_decode import attention_decode, plan_decode
from gpu_kernels.attention_prefill import attention_prefill
from gpu_kernels.attention_variant import Variant
from gpu_kernels.bell import answer
from gpu_kernels.embedding import embedding
from gpu_kernels.expert_decode import expert_decode
from gpu_kernels.expert_weights import DenseWeights, ExpertLayer, PackedLayout, PackedWeights
from gpu_kernels.few_rows import few_rows_linear
from gpu_kernels.grouped_gemm import grouped_experts
from gpu_kernels.hand_over import ColdWork, Pulls, collect, publish
from gpu_kernels.host_memory import read_host, write_host
from gpu_kernels.host_words import Bell, Ring
from gpu_kernels.kv_append import rope_and_append
from gpu_kernels.kv_quant import INT4, new_kv_scales, stored_size
from gpu_kernels.last_rows import LastRows
from gpu_kernels.merge_states import merge_state, merge_states
from gpu_kernels.norm_route import norm_route
from gpu_kernels.page_table import PageTable
from gpu_kernels.rmsnorm import add_rms_norm
from gpu_kernels.router import route
from gpu_kernels.sampling import Penalties, SamplingSettings, sample
from gpu_kernels.silu_mul import silu_mul
from gpu_kernels.token_counts import count_tokens

# KiB of shared memory that one block may have, by compute capability (CUDA's programming guide).
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
BF16 = torch.bfloat16
HEADS = (32, 4)


class AbsentGpu:
    """A driver for Triton that knows what to compile for, and nothing to run it on."""

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True, slots=True)
class Compiled:
    name: str
    shared_bytes: int
    registers: int
    spilled_bytes: int
    num_warps: int


def compile_launches(launch: Callable[[], object], sm: int) -> list[Compiled]:
    """What ``launch`` would have run, compiled for compute capability ``sm / 10``."""
    kernels: dict[int, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **{**options, "warmup": True})
        kernels[id(kernel)] = kernel
        return kernel

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return [_assembled(kernel, sm) for kernel in kernels.values()]


def _assembled(kernel: Any, sm: int) -> Compiled:
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        name = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
        ptxas = TOOLS / ("ptxas-blackwell" if sm >= 100 else "ptxas")  # as triton chooses
        command = [str(ptxas), "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return Compiled(
        kernel.metadata.name,
        kernel.metadata.shared,
        _number(r"Used (\d+) registers", said),
        _number(r"(\d+) bytes spill stores", said),
        kernel.metadata.num_warps,
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


# --- what is compiled ---


def _cache(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    kv_cache = torch.zeros(64, 2, 16, HEADS[1], stored_size(head_dim, dtype), dtype=dtype)
    return kv_cache, None if dtype in (BF16, torch.float32) else new_kv_scales(kv_cache)


def decode(head_dim: int, dtype: torch.dtype, variant: Variant) -> None:
    kv_cache, kv_scales = _cache(head_dim, dtype)
    pages = PageTable.from_lists([range(32), range(32, 64)], [512, 512])
    plan = plan_decode(2, *HEADS, head_dim, device="cpu", dtype=dtype)
    q = torch.zeros(2, HEADS[0], head_dim, dtype=BF16)
    attention_decode(q, kv_cache, pages, plan, sm_scale=0.1, variant=variant, kv_scales=kv_scales)


def prefill(head_dim: int, dtype: torch.dtype, variant: Variant) -> None:
    kv_cache, kv_scales = _cache(head_dim, dtype)
    pages = PageTable.from_lists([range(32), range(32, 64)], [512, 512])
    q = torch.zeros(1024, HEADS[0], head_dim, dtype=dtype if dtype == torch.float32 else BF16)
    indptr = torch.tensor([0, 512, 1024], dtype=torch.int32)
    options: dict[str, Any] = {"sm_scale": 0.1, "variant": variant, "kv_scales": kv_scales}
    for longest in (1, 8, 512):
        attention_prefill(q, kv_cache, pages, indptr, max_qo_len=longest, **options)


def append(head_dim: int, dtype: torch.dtype) -> None:
    kv_cache, kv_scales = _cache(head_dim, dtype)
    qkv = torch.zeros(4, HEADS[0] + 2 * HEADS[1], head_dim, dtype=BF16)
    cos, sin = torch.zeros(2, 64, head_dim // 2)
    index = torch.zeros(4, dtype=torch.int64)
    norm = torch.ones(head_dim, dtype=BF16)
    q, k, v = torch.split(qkv, [HEADS[0], HEADS[1], HEADS[1]], dim=1)
    rope_and_append(q, k, v, cos, sin, index, index, kv_cache, norm, norm, kv_scales=kv_scales)


def small() -> None:
    x, weight = torch.zeros(4, 2048, dtype=BF16), torch.ones(2048, dtype=BF16)
    add_rms_norm(x, x, weight, 1e-6)
    silu_mul(x)
    v, lse = torch.zeros(2, 3, 32, 128, dtype=BF16), torch.zeros(2, 3, 32)
    merge_states(v, lse)
    merge_state(v[:, 0], lse[:, 0].contiguous(), v[:, 1], lse[:, 1].contiguous())
    write_host(x, x.float())
    read_host(lse, lse, add=lse)


def routing() -> None:
    route(torch.zeros(4, 128, dtype=BF16), 8, scoring="softmax", renormalise=True)
    bias = torch.zeros(256)
    logits = torch.zeros(4, 256)
    route(logits, 8, scoring="sigmoid", bias_E=bias, renormalise=True, num_groups=8, top_groups=4)
    for hidden, num_experts in ((2048, 128), (4096, 8)):
        x, router = torch.zeros(1, hidden, dtype=BF16), torch.zeros(num_experts, hidden, dtype=BF16)
        norm_route(x, x, x[0], router, 2, 1e-6)


def hand_over() -> None:
    x, weight = torch.zeros(4, 2048, dtype=BF16), torch.ones(2048, dtype=BF16)
    ids, weights = torch.zeros(4, 8, dtype=torch.int32), torch.zeros(4, 8)
    part, slot, used = torch.zeros(4, 2048), torch.zeros(128, dtype=torch.int32), ids.view(-1)[:1]
    word, done = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    bell = Bell(word, 3)
    answer(bell, bell)
    cold = ColdWork(part, ids, weights, Ring(word, bell, done))
    publish(
        x[:1],
        ids[:1],
        weights[:1],
        slot,
        used,
        ids[:1],
        ColdWork(part[:1], ids[:1], weights[:1], cold.ring),
    )
    publish(x, ids, weights, slot, used, ids, ColdWork(part, ids, weights, Ring(word)))
    publish(x, ids, weights, slot, used, ids, cold)
    publish(x, ids, weights, slot, used, ids, cold, pulls=Pulls(slot, slot, 768, ids, ids))
    publish(x, ids, weights, slot, used, ids, None)
    collect(x, (part, part), x, weight, 1e-6)
    collect(x, (part, part, part), x, weight, 1e-6)
    collect(x, (part,), None, weight, 1e-6, late=bell)
    collect(x, (part, part, part), x, weight, 1e-6, late=bell)


def draw() -> None:
    vocab = 151_936
    ones, whole = torch.ones(4), torch.ones(4, dtype=torch.int64)
    settings = SamplingSettings(ones, whole.int(), ones, ones, whole, whole)
    counts = torch.zeros(4, vocab, dtype=torch.int16)
    sample(torch.zeros(4, vocab), settings)
    penalties = Penalties(ones, ones, ones, whole.int(), counts)
    sample(torch.zeros(4, vocab), settings, penalties=penalties)
    count_tokens(counts, whole.int(), whole)
    embedding(whole, torch.zeros(vocab, 64, dtype=BF16))


def experts(bits: int, num_tokens: int, dtype: torch.dtype = BF16) -> None:
    """The experts of Qwen3-30B-A3B, 16 bits or packed; few tokens or many, of ``dtype``."""
    slots, hidden, width, top_k = 4, 2048, 768, 2
    if bits == 16:
        w13 = torch.zeros(slots, 2 * width, hidden, dtype=BF16)
        layer = ExpertLayer(DenseWeights(w13, torch.zeros(slots, hidden, width, dtype=BF16)))
    else:
        group, scales = (64, BF16) if bits == 12 else (128, torch.float16)
        layout = PackedLayout(bits, group, bits == 4, scales, hidden, width)
        blob = torch.zeros(slots, layout.expert_bytes, dtype=torch.uint8)
        layer = ExpertLayer(PackedWeights(blob, layout))
    x = torch.zeros(num_tokens, hidden, dtype=dtype)
    ids = torch.zeros(num_tokens, top_k, dtype=torch.int32)
    step = x, ids, torch.zeros(num_tokens, top_k), torch.zeros(8, dtype=torch.int32), layer
    if num_tokens > 32:
        grouped_experts(*step)
        return
    expert_decode(*step)
    expert_decode(*step, last_rows=LastRows(ids, 256, 64 if bits >= 12 else 128))


def few_rows(num_tokens: int) -> None:
    """qkv and o of Qwen3-30B-A3B."""
    for rows, depth in ((5120, 2048), (2048, 4096)):
        x = torch.zeros(num_tokens, depth, dtype=BF16)
        few_rows_linear(x, torch.zeros(rows, depth, dtype=BF16))


def cases(sm: int) -> dict[str, Callable[[], object]]:
    """Launches by name; fp8 needs compute capability 8.9."""
    variants = {
        "window and sinks": Variant(window_left=100, sinks_H=torch.zeros(HEADS[0])),
        "cap": Variant(logits_soft_cap=30.0),
        "ALiBi": Variant(alibi_slopes_H=torch.zeros(HEADS[0])),
    }
    found: dict[str, Callable[[], object]] = {"small": small, "routing": routing, "sampling": draw}
    found["hand over"] = hand_over
    for dtype in (BF16, torch.int8, INT4, *((torch.float8_e4m3fn,) if sm >= 89 else ())):
        kind = "int4" if dtype == INT4 else str(dtype).removeprefix("torch.")
        found[f"append 128 {kind}"] = partial(append, 128, dtype)
        for head_dim in (64, 128, 192, 256):
            found[f"decode attention {head_dim} {kind}"] = partial(
                decode, head_dim, dtype, Variant()
            )
            found[f"prefill attention {head_dim} {kind}"] = partial(
                prefill, head_dim, dtype, Variant()
            )
    for bits in (4, 8, 12, 16):
        for num_tokens in (1, 32, 4096):
            found[f"experts {bits} bits {num_tokens}"] = partial(experts, bits, num_tokens)
    for num_tokens in (1, 2):
        found[f"few rows {num_tokens}"] = partial(few_rows, num_tokens)
    for head_dim in (32, 64, 128, 256):
        name = f"prefill attention {head_dim} float32"
        found[name] = partial(prefill, head_dim, torch.float32, Variant())
    found["experts 16 bits float32 4096"] = partial(experts, 16, 4096, torch.float32)
    for name, variant in variants.items():
        found[f"decode attention 128 {name}"] = partial(decode, 128, BF16, variant)
        found[f"prefill attention 128 {name}"] = partial(prefill, 128, BF16, variant)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sm", type=int, default=90, choices=SHARED_KIB, help="90: Hopper")
    parser.add_argument("--only", nargs="*", default=[""], help="cases with such a text in them")
    options = parser.parse_args()
    device.WITHOUT_CUDA = device.family_of((options.sm // 10, options.sm % 10)) or "sm80"
    driver.set_active(AbsentGpu(options.sm))
    fits = True
    print(f"{'case':40} {'kernel':22} {'warps':>5} {'regs':>4} {'spilled':>7} {'shared':>7}")
    for name, launch in cases(options.sm).items():
        if not any(part in name for part in options.only):
            continue
        for kernel in compile_launches(launch, options.sm):
            fits &= kernel.shared_bytes <= SHARED_KIB[options.sm] * 1024
            numbers = f"{kernel.registers:4} {kernel.spilled_bytes:7} {kernel.shared_bytes:7}"
            print(f"{name:40} {kernel.name:22} {kernel.num_warps:5} {numbers}", flush=True)
    sys.exit(0 if fits else f"too much shared memory for sm_{options.sm}")


if __name__ == "__main__":
    main()

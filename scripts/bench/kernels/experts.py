"""Resident experts: decode against a plain read of the weights, prefill against torch.matmul.

Run: PYTHONPATH=. python -m scripts.bench.kernels.experts [--tune decode|prefill]
"""

from __future__ import annotations

import argparse

import torch

from gpu_kernels.expert_decode import DecodeWorkspace, expert_decode, expert_decode_reference
from gpu_kernels.grouped_gemm import GroupedWorkspace, grouped_experts
from scripts.bench.kernels.expert_case import DEVICE, FORMATS, SHAPES, Case, make_layer
from scripts.bench.kernels.timing import graph_ms
from scripts.bench.rows import Row, at_least, table

DECODE_TOKENS = (1, 2, 4, 8)
PREFILL_TOKENS = (512, 2048)
DECODE_TARGETS = {"mixtral-8x7b": 0.8, "qwen3-30b-a3b": 0.6}
PREFILL_TARGETS = {"bf16": 0.65, "bf12": 0.45, "w4g128": 0.45}


def read_ms(num_bytes: int) -> float:
    """Milliseconds of a plain read of so many bytes."""
    return graph_ms(torch.ones(num_bytes // 4, device=DEVICE).sum)


def matmul_ms(case: Case) -> float:
    """Milliseconds of one bf16 matrix product with as many operations as the case's experts."""
    pairs = case.num_tokens * case.shape.top_k
    a = torch.randn(pairs, case.shape.hidden, dtype=torch.bfloat16, device=DEVICE)
    b = torch.randn(3 * case.shape.width, case.shape.hidden, dtype=torch.bfloat16, device=DEVICE)
    return graph_ms(lambda: a @ b.T)


def decode_ms(case: Case, **options: object) -> float:
    out = torch.empty(case.num_tokens, case.shape.hidden, device=DEVICE)
    workspace = DecodeWorkspace.make(case.layer, case.num_tokens * case.shape.top_k)
    return graph_ms(lambda: case.run(expert_decode, out=out, workspace=workspace, **options))


def prefill_ms(case: Case, **options: object) -> float:
    out = torch.empty(case.num_tokens, case.shape.hidden, device=DEVICE)
    workspace = GroupedWorkspace.make(case.layer, case.num_tokens * case.shape.top_k)
    return graph_ms(lambda: case.run(grouped_experts, out=out, workspace=workspace, **options))


def decode_row(name: str, case: Case, target: float) -> Row:
    expected = case.run(expert_decode_reference)
    error = ((case.run(expert_decode) - expected).norm() / expected.norm()).item()
    assert error <= 5e-3, f"{name}: relative error {error:.1e}"
    num_bytes = case.touched_bytes
    ours, read = decode_ms(case), read_ms(num_bytes)
    gbps = num_bytes / ours / 1e6
    return at_least(name, gbps, "GB/s", num_bytes / read / 1e6, read / ours, target)


def prefill_row(name: str, case: Case, target: float) -> Row:
    few = Case(case.shape, case.layer, 64)
    expected = few.run(expert_decode_reference)
    error = ((few.run(grouped_experts) - expected).norm() / expected.norm()).item()
    assert error <= 5e-3, f"{name}: relative error {error:.1e}"
    ours, limit = prefill_ms(case), matmul_ms(case)
    tflops = case.flops / ours / 1e9
    return at_least(name, tflops, "TF/s", case.flops / limit / 1e9, limit / ours, target)


def rows() -> list[Row]:
    """One row per shape, format and number of tokens."""
    torch.manual_seed(0)
    found = []
    for name, shape in SHAPES.items():
        for weights in FORMATS:
            layer = make_layer(shape, weights)
            for num_tokens in DECODE_TOKENS:
                case = Case(shape, layer, num_tokens)
                title = f"experts decode {name} {weights} M={num_tokens}"
                found.append(decode_row(title, case, DECODE_TARGETS[name]))
            for num_tokens in PREFILL_TOKENS:
                case = Case(shape, layer, num_tokens)
                title = f"experts prefill {name} {weights} M={num_tokens}"
                found.append(prefill_row(title, case, PREFILL_TARGETS[weights]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", choices=("decode", "prefill"), help="time other tile sizes")
    if which := parser.parse_args().tune:
        from scripts.bench.kernels.tune_experts import tune  # it imports this module

        tune(which)
        return
    print(torch.cuda.get_device_name())
    print(table(rows()))


if __name__ == "__main__":
    main()

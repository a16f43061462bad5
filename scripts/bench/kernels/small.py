"""Router, embedding and sampling: bytes per second against what launches and reading leave.

Each call is captured into a CUDA graph, as a decode step runs it. The limit is the time of as many
empty kernels in a graph, plus that of reading the bytes that the call must touch. What does the
work of several launches stands beside these.

Run: PYTHONPATH=. python -m scripts.bench.kernels.small
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_kernels.embedding import embedding
from gpu_kernels.norm_route import RouteWorkspace, norm_route
from gpu_kernels.rmsnorm import add_rms_norm
from gpu_kernels.router import route
from gpu_kernels.sampling import Penalties, SamplingScratch, SamplingSettings, sample
from scripts.bench.kernels.timing import graph_ms, measure_peaks
from scripts.bench.rows import Row, at_least, table

DEVICE = "cuda"
VOCAB, HIDDEN, NUM_EXPERTS, TOP_K = 151_936, 2048, 128, 8  # Qwen3-30B-A3B
TOKENS = (1, 32, 4096)
ROUTED = ((1, 2048, 128, 8), (8, 2048, 128, 8), (1, 4096, 8, 2))  # and Mixtral
BATCHES = (1, 8, 32)
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "no filter": {"temperature": 1.0},
    "Qwen3's settings": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_p": {"temperature": 1.0, "top_p": 0.95},
    "min_p": {"temperature": 1.0, "min_p": 0.05},
}
# Of the limit. A draw makes a random number for each token of the vocabulary.
LEAST = {"route": 0.3, "embedding": 0.5, "greedy": 0.5, "drawn": 0.3, "filtered": 0.1}


class Limits:
    """What launches and reading cost on this GPU."""

    def __init__(self) -> None:
        self._read_gbps = measure_peaks().read_gbps
        one = torch.zeros(1, device=DEVICE)

        def launch(count: int) -> None:
            for _ in range(count):
                one.add_(1)

        self._launches_ms = {n: graph_ms(functools.partial(launch, n)) for n in (1, 2)}

    def gbps(self, num_bytes: int, launches: int) -> float:
        milliseconds = self._launches_ms[launches] + num_bytes / self._read_gbps / 1e6
        return num_bytes / milliseconds / 1e6


def rows() -> list[Row]:
    """Every case of this file, measured."""
    torch.manual_seed(0)
    limits = Limits()
    found = []
    for num_tokens in TOKENS:
        found += [route_row(num_tokens, limits), embedding_row(num_tokens, limits)]
    found += [norm_route_row(*sizes) for sizes in ROUTED]
    for batch in BATCHES:
        found += [sample_row(name, batch, limits) for name in SETTINGS]
        found.append(sample_row("greedy", batch, limits, is_penalised=True))
    return found


def route_row(num_tokens: int, limits: Limits) -> Row:
    logits_TE = torch.randn(num_tokens, NUM_EXPERTS, dtype=torch.bfloat16, device=DEVICE)
    num_bytes = num_tokens * (2 * NUM_EXPERTS + 8 * TOP_K)
    name = f"route {num_tokens} x {NUM_EXPERTS}, top {TOP_K}"
    return row(name, lambda: route(logits_TE, TOP_K), num_bytes, limits, LEAST["route"])


def norm_route_row(num_tokens: int, hidden: int, num_experts: int, top_k: int) -> Row:
    """Beside the four launches whose work it does."""
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": DEVICE}
    x_TH, residual_TH = torch.randn(2, num_tokens, hidden, **half)
    norm_H, router_EH = torch.ones(hidden, **half), torch.randn(num_experts, hidden, **half)
    workspace = RouteWorkspace.make(num_tokens, num_experts, **half)

    def together() -> object:
        return norm_route(x_TH, residual_TH, norm_H, router_EH, top_k, 1e-6, workspace=workspace)

    def apart() -> object:
        normed_TH, _ = add_rms_norm(x_TH, residual_TH, norm_H, 1e-6)
        return route(F.linear(normed_TH, router_EH), top_k)

    per_ms = [1 / graph_ms(run) for run in (together, apart)]
    name = f"norm_route {num_tokens} x {hidden} x {num_experts}, of launches apart"
    return at_least(name, per_ms[0], "1/ms", per_ms[1], per_ms[0] / per_ms[1], 1.0)


def embedding_row(num_tokens: int, limits: Limits) -> Row:
    table_VH = torch.randn(VOCAB, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    ids_T = torch.randint(VOCAB, (num_tokens,), device=DEVICE)
    num_bytes = 2 * num_tokens * HIDDEN * 2
    name = f"embedding {num_tokens} x {HIDDEN}"
    return row(name, lambda: embedding(ids_T, table_VH), num_bytes, limits, LEAST["embedding"])


def sample_row(name: str, batch: int, limits: Limits, *, is_penalised: bool = False) -> Row:
    logits_BV = peaked_logits(batch)
    settings = make_settings(batch, SETTINGS[name])
    out = torch.empty(batch, dtype=torch.int64, device=DEVICE)
    options: dict[str, Any] = {"scratch": SamplingScratch.for_batch(batch, VOCAB, DEVICE)}
    num_bytes = batch * VOCAB * 4
    if is_penalised:
        name, num_bytes = f"{name}, penalised", num_bytes + batch * VOCAB * 2
        options["penalties"] = make_penalties(batch)
    kind = "filtered" if len(SETTINGS.get(name, {})) > 1 else "drawn"
    least = LEAST["greedy" if name.startswith("greedy") else kind]

    def run() -> Tensor:
        return sample(logits_BV, settings, out=out, **options)

    return row(f"sample {batch} x {VOCAB}, {name}", run, num_bytes, limits, least, launches=2)


def row(
    name: str,
    run: Callable[[], object],
    num_bytes: int,
    limits: Limits,
    target: float,
    *,
    launches: int = 1,
) -> Row:
    limit = limits.gbps(num_bytes, launches)
    value = num_bytes / graph_ms(run) / 1e6
    return at_least(name, value, "GB/s", limit, value / limit, target)


def peaked_logits(batch: int) -> Tensor:
    """Logits as of a model: a wide bulk, and some fifty tokens that stand out."""
    logits_BV = 2 * torch.randn(batch, VOCAB, device=DEVICE)
    logits_BV[:, torch.randperm(VOCAB)[:50]] += 14 * torch.rand(batch, 50, device=DEVICE)
    return logits_BV


def make_settings(batch: int, values: dict[str, float]) -> SamplingSettings:
    defaults = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    temperature_B, top_k_B, top_p_B, min_p_B = (
        torch.full((batch,), float((defaults | values)[name]), device=DEVICE)
        for name in ("temperature", "top_k", "top_p", "min_p")
    )
    seed_B = torch.arange(batch, device=DEVICE)
    return SamplingSettings(temperature_B, top_k_B.int(), top_p_B, min_p_B, seed_B, seed_B + 100)


def make_penalties(batch: int) -> Penalties:
    ones_B = torch.ones(batch, device=DEVICE)
    slot_B = torch.arange(batch, dtype=torch.int32, device=DEVICE)
    counts_SV = torch.randint(2, (batch, VOCAB), dtype=torch.int16, device=DEVICE)
    return Penalties(1.1 * ones_B, 0.5 * ones_B, 0.1 * ones_B, slot_B, counts_SV)


def main() -> None:
    print(torch.cuda.get_device_name())
    print(table(rows()))


if __name__ == "__main__":
    main()

"""How long a prompt will take, as a sum of named parts: pure.

On a GPU a layer takes as long as the slowest of three: the link, which brings cold experts without
a pause, and the GPU or the CPU with theirs, behind what a layer needs besides.
"""

from collections.abc import Sequence
from functools import cache

from offload.chances import LayerChances, token_counts
from offload.demand import Demand
from offload.limits import GIGA, TERA
from offload.machine_rates import MachineRates
from offload.prediction import (
    EAGER_CALLS,
    EAGER_LAYER_S,
    STEP_S,
    Prediction,
    Sum,
    chunk_sizes,
    total_of,
)
from offload.prefill_division import CPU_START_S, LINK_BYTES_PER_S, Division, PrefillCosts, Ring
from offload.prefill_split import LEAST_TOKENS
from offload.staging import bank_slots

# Parts of a large product's rate that are reached: dense layers, grouped experts, attention.
DENSE_PART, EXPERT_PART, ATTENTION_PART = 0.7, 0.4, 0.4
LAYER_S = 1.5e-3  # Python and small kernels of a layer of a prompt on a GPU
SEND_S = 3.5e-5  # Python for each expert that is sent


def predict_prefill(
    demand: Demand, rates: MachineRates, *, num_tokens: int, depth: int = 0
) -> Prediction:
    """A prompt of ``num_tokens`` behind ``depth`` others, up to its first token."""
    begin, parts = depth, []
    for size in chunk_sizes(num_tokens, demand.step_tokens):
        parts.append(_step(demand, rates, size, begin))
        begin += size
    end = Sum()
    read = rates.peaks.gpu_read_gbps if demand.on_gpu else rates.peaks.cpu_read_gbps
    end.add("head", demand.head_bytes / (read * GIGA))
    return total_of([*parts, end.prediction()])


def _step(demand: Demand, rates: MachineRates, tokens: int, begin: int) -> Prediction:
    total = Sum()
    total.add("step in Python", STEP_S)
    flops_per_s = rates.peaks_for(on_gpu=demand.on_gpu).gemm_tflops * TERA
    keys = tokens * (begin + (tokens + 1) / 2)
    attention_s = 4 * demand.attention_width * keys / (flops_per_s * ATTENTION_PART)
    read = rates.peaks.gpu_read_gbps if demand.on_gpu else rates.peaks.cpu_read_gbps
    dense_bytes = demand.layer_bytes + demand.shared_bytes
    dense_s = max(
        2 * tokens * demand.layer_numel / (flops_per_s * DENSE_PART), dense_bytes / (read * GIGA)
    )
    if not demand.on_gpu:
        _cpu_layers(demand, rates, tokens, attention_s, dense_s, total)
        return total.prediction()
    num_dense = demand.num_layers - len(demand.layers)
    total.add("dense layers", num_dense * (dense_s + attention_s))
    many = tokens >= LEAST_TOKENS and demand.disk_share == 0
    sides = cache(lambda layer: _gpu_sides(demand, rates, layer, tokens, streams=many))
    for layer in demand.layers:
        link_s, cpu_s, experts_s, num_sent = sides(layer)
        python_s = LAYER_S + num_sent * SEND_S
        before = {"GPU dense": dense_s, "attention": attention_s}
        total.add_slower(
            {"cold experts, PCIe": link_s},
            before | {"GPU experts": experts_s},
            {"layers in Python": python_s},
            {"cold experts, CPU": cpu_s},
        )
    return total.prediction()


def _gpu_sides(
    demand: Demand, rates: MachineRates, layer: LayerChances, tokens: int, *, streams: bool
) -> tuple[float, float, float, int]:
    """Seconds of the link, of the CPU and of the GPU for one layer's experts; how many are sent."""
    expert_s = rates.expert_s(demand.codes, demand.activations, demand.expert_bytes)
    hand_over = rates.switch_over(demand.codes, demand.activations, demand.expert_bytes)

    def cpu_expert_s(count: int) -> float:
        handed = hand_over is not None and count >= hand_over
        return rates.beside_s(expert_s(count, handed), demand.expert_bytes)

    counts = token_counts(layer.cold, tokens)
    copy_s = demand.expert_bytes / (rates.peaks.pcie_gbps * GIGA)
    on_cpu: Sequence[int] = counts
    if streams and demand.staging_slots:
        costs = PrefillCosts(copy_s=copy_s, expert_s=cpu_expert_s, hand_over=hand_over)
        on_cpu = _cpu_counts(demand, costs, counts, tokens)
    sent = len(counts) - len(on_cpu)
    transfer_s = 4 * tokens * demand.hidden / LINK_BYTES_PER_S if on_cpu else 0.0
    cpu_s = sum(map(cpu_expert_s, on_cpu)) + (CPU_START_S + 2 * transfer_s if on_cpu else 0.0)
    hot = token_counts(layer.hot, tokens)
    pairs = sum(hot) + sum(counts) - sum(on_cpu)
    experts_s = _gpu_experts_s(demand, rates, pairs, len(hot) + sent)
    return sent * copy_s + transfer_s, cpu_s, experts_s, sent


def _cpu_counts(demand: Demand, costs: PrefillCosts, counts: list[int], tokens: int) -> list[int]:
    """Tokens of the experts that the CPU takes, as the engine divides a layer between others."""
    num_experts = len(demand.layers[0].hot) + len(demand.layers[0].cold)
    division = Division(
        costs=costs,
        ring=Ring(num_slots=demand.staging_slots, bank_size=bank_slots(demand.staging_slots)),
        tokens_each=tokens * demand.top_k / num_experts,
        state_bytes=4 * tokens * demand.hidden,
    )
    ahead = division.rows_ahead(len(counts))
    rest = counts[ahead:]  # the popular ones are under way
    return [rest[n] for n in division.cpu_share(rest, ahead, ahead * costs.copy_s)]


def _gpu_experts_s(demand: Demand, rates: MachineRates, pairs: int, num_experts: int) -> float:
    flops_s = 2 * pairs * demand.expert_numel / (rates.peaks.gemm_tflops * TERA * EXPERT_PART)
    return max(flops_s, num_experts * demand.expert_bytes / (rates.peaks.gpu_read_gbps * GIGA))


def _cpu_layers(
    demand: Demand,
    rates: MachineRates,
    tokens: int,
    attention_s: float,
    dense_s: float,
    total: Sum,
) -> None:
    """Without a GPU: one thing after the other."""
    calls_s = EAGER_CALLS * rates.call_s + EAGER_LAYER_S
    total.add("dense", demand.num_layers * dense_s)
    total.add("attention", demand.num_layers * attention_s)
    total.add("calls", demand.num_layers * calls_s)
    expert_s = rates.expert_s(demand.codes, "f32", demand.expert_bytes)
    flops_per_s = rates.peaks_for(on_gpu=False).gemm_tflops * TERA
    for layer in demand.layers:
        total.add("experts", sum(expert_s(n, False) for n in token_counts(layer.cold, tokens)))
        hot = token_counts(layer.hot, tokens)
        by_torch = 2 * sum(hot) * demand.expert_numel / (flops_per_s * DENSE_PART)
        read_s = len(hot) * demand.expert_bytes / (rates.peaks.cpu_read_gbps * GIGA)
        total.add("experts by torch", max(by_torch, read_s))

"""How long a prompt will take, as a sum of named parts: pure.

On a GPU a layer takes as long as the slowest of three: the link, which brings cold experts and only
pauses where the ring is full before a layer's router has run, and the GPU or the CPU with theirs,
behind what a layer needs besides.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

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
    add_disk,
    chunk_sizes,
)
from offload.prefill_division import CPU_START_S, LINK_BYTES_PER_S, Division, PrefillCosts
from offload.prefill_split import GAP_S, LEAST_TOKENS
from offload.staging import bank_slots

# Parts of a large product's rate that are reached: dense layers, grouped experts, attention.
DENSE_PART, EXPERT_PART, ATTENTION_PART = 0.7, 0.4, 0.4
# What Python does for a layer of a prompt on a GPU, in launches of a kernel: for one without cold
# experts, for others, for experts that are sent, and for each of their banks.
RESIDENT_LAUNCHES, LAYER_LAUNCHES, SENT_LAUNCHES, BANK_LAUNCHES = 28, 40.5, 11, 2.2
# and what a layer loses where the CPU has a share of it, as Python waits for that before it goes on
TURN_LAUNCHES = 33


def predict_prefill(
    demand: Demand, rates: MachineRates, *, num_tokens: int, depth: int = 0, prompts: int = 1
) -> Prediction:
    """Prompts of ``num_tokens``, each behind ``depth`` others, up to their first tokens.

    Several are read one behind the other, in steps that may hold parts of two.
    """
    sides = cache(partial(_gpu_sides, demand, rates, cache(partial(_divider, demand, rates))))
    step = partial(_step, demand, rates, Counter(demand.layers), sides)
    total = Sum()
    for (size, keys), number in Counter(_steps(demand, num_tokens, depth, prompts)).items():
        total.add_all(step(size, keys), weight=number)
    read = rates.peaks.gpu_read_gbps if demand.on_gpu else rates.peaks.cpu_read_gbps
    total.add("head", demand.head_bytes / (read * GIGA))
    return total.prediction()


def _steps(
    demand: Demand, num_tokens: int, depth: int, prompts: int
) -> Iterator[tuple[int, float]]:
    """Of each step its tokens and the keys that these look at, in a layer.

    Of several prompts every step looks at as many as the mean token does: full steps are equal.
    """
    begin, middle = depth, depth + (num_tokens + 1) / 2
    for size in chunk_sizes(prompts * num_tokens, demand.step_tokens):
        yield size, size * (begin + (size + 1) / 2 if prompts == 1 else middle)
        begin += size


def _step(
    demand: Demand,
    rates: MachineRates,
    layers: Counter[LayerChances],
    sides: "Sides",
    tokens: int,
    keys: float,
) -> Prediction:
    """``layers``: those with experts, equal ones counted once for all steps."""
    total = Sum()
    total.add("step in Python", STEP_S)
    flops_per_s = rates.peaks_for(on_gpu=demand.on_gpu).gemm_tflops * TERA
    attention_s = 4 * demand.attention_width * keys / (flops_per_s * ATTENTION_PART)
    read = rates.peaks.gpu_read_gbps if demand.on_gpu else rates.peaks.cpu_read_gbps
    dense_bytes = demand.layer_bytes + demand.shared_bytes
    dense_s = max(
        2 * tokens * demand.layer_numel / (flops_per_s * DENSE_PART), dense_bytes / (read * GIGA)
    )
    if not demand.on_gpu:
        _cpu_layers(demand, rates, tokens, attention_s, dense_s, total)
        add_disk(demand, rates, tokens, total)
        return total.prediction()
    num_dense = demand.num_layers - len(demand.layers)
    total.add("dense layers", num_dense * (dense_s + attention_s))
    streams = tokens >= LEAST_TOKENS and demand.disk_share == 0 and demand.staging_slots > 0
    for layer, number in layers.items():
        side = sides(layer, tokens, streams)
        before = {"GPU dense": dense_s, "attention": attention_s}
        link = {"cold experts, PCIe": side.link_s}
        if side.link_s:
            link["PCIe, ring full"] = max(0.0, max(GAP_S, dense_s + attention_s) - side.ahead_s)
        total.add_slower(
            link,
            before | {"GPU experts": side.experts_s},
            {"layers in Python": side.python_s},
            {"cold experts, CPU": side.cpu_s},
            weight=number,
        )
        if streams and side.cpu_s:
            turn_s = TURN_LAUNCHES * rates.python_launch_s
            total.add("taking turns with the CPU", number * turn_s)
    add_disk(demand, rates, tokens, total)
    return total.prediction()


@dataclass(frozen=True, slots=True)
class _Sides:
    """Seconds of the link, the CPU, the GPU and Python for one layer's experts.

    ``ahead_s``: of the link, with what is sent before the layer's router has run.
    """

    link_s: float
    cpu_s: float
    experts_s: float
    python_s: float
    ahead_s: float


Sides = Callable[[LayerChances, int, bool], _Sides]


def _gpu_sides(
    demand: Demand,
    rates: MachineRates,
    divider: "Callable[[int], _Divider]",
    layer: LayerChances,
    tokens: int,
    streams: bool,
) -> _Sides:
    costs = _costs(rates, demand.codes, demand.activations, demand.expert_bytes)
    counts = token_counts(layer.cold, tokens)
    copy_s = costs.copy_s
    on_cpu: Sequence[int] = counts
    ahead = 0
    if streams:
        ahead, on_cpu = divider(tokens)(counts)
    sent = len(counts) - len(on_cpu)
    transfer_s = 4 * tokens * demand.hidden / LINK_BYTES_PER_S if on_cpu else 0.0
    cpu_s = sum(map(costs.expert_s, on_cpu)) + (CPU_START_S + 2 * transfer_s if on_cpu else 0.0)
    hot = token_counts(layer.hot, tokens)
    pairs = sum(hot) + sum(counts) - sum(on_cpu)
    experts_s = _gpu_experts_s(demand, rates, pairs, len(hot) + sent)
    banks = -(-sent // bank_slots(demand.staging_slots, demand.expert_bytes))
    launches = LAYER_LAUNCHES if counts else RESIDENT_LAUNCHES
    launches += SENT_LAUNCHES + banks * BANK_LAUNCHES if sent else 0
    return _Sides(
        link_s=sent * copy_s + transfer_s,
        cpu_s=cpu_s,
        experts_s=experts_s,
        python_s=launches * rates.python_launch_s,
        ahead_s=ahead * copy_s,
    )


@lru_cache(maxsize=8)
def _costs(rates: MachineRates, codes: str, activations: str, expert_bytes: int) -> PrefillCosts:
    """What an expert costs; by its tokens it is worked out once for all layouts of a model."""
    columns_from = rates.switch_over(codes, activations, expert_bytes)
    expert_s = rates.expert_s(codes, activations, expert_bytes)

    def seconds(count: int) -> float:
        by_columns = columns_from is not None and count >= columns_from
        return rates.beside_s(expert_s(count, by_columns), expert_bytes)

    copy_s = expert_bytes / (rates.peaks.pcie_gbps * GIGA)
    return PrefillCosts(copy_s=copy_s, expert_s=cache(seconds), columns_from=columns_from)


_Divider = Callable[[list[int]], tuple[int, list[int]]]


def _divider(demand: Demand, rates: MachineRates, tokens: int) -> _Divider:
    """How the engine divides a layer between others: by the tokens of its cold experts, descending,
    how many are sent ahead, and tokens of those that the CPU takes."""
    costs = _costs(rates, demand.codes, demand.activations, demand.expert_bytes)
    num_experts = len(demand.layers[0].hot) + len(demand.layers[0].cold)
    division = Division(
        costs=costs,
        num_slots=demand.staging_slots,
        tokens_each=tokens * demand.top_k / num_experts,
        state_bytes=4 * tokens * demand.hidden,
    )
    rows_ahead = cache(division.rows_ahead)

    def divided(counts: list[int]) -> tuple[int, list[int]]:
        ahead = rows_ahead(len(counts))
        rest = counts[ahead:]  # the popular ones are under way
        taken = division.cpu_share(rest, ahead, ahead * costs.copy_s)
        return ahead, [rest[n] for n in taken]

    return divided


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

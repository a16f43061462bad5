"""How long steps will take, as a sum of named parts, from a machine's rates: pure.

A decode step is, layer by layer, what the GPU does while the workers wait for it, and then the
slowest of three: the workers' rows of the cold experts, the rows that the GPU pulls, or the
resident experts. Of those that work at the same time only the slowest counts in the sum, and
``busy_s`` says what each takes.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

from offload.chances import LayerChances, distinct
from offload.cold_share import ShareCosts
from offload.demand import Demand
from offload.limits import GIGA
from offload.machine_rates import STEP_PART, MachineRates

# Kernels of a decode step's layer beside its experts and the hand-over: a norm, qkv, rope and
# append, two of attention, o, a norm with the router's product and its choice, publishing; and two
# of residents. The norm, the product and the choice are three kernels for more than 8 tokens.
LAYER_KERNELS, ROUTE_KERNELS, ROUTED_AT_ONCE = 10, 2, 8
# What each of them takes beside a small one's time, however little it reads: more programs to wait
# for. A layer of Qwen3-30B's took 58 us without cold experts, 14 of them bytes, and where kernels
# start early 12 less, which the small one saves too.
KERNEL_S = 2.2e-6
# Weights are read by products of one row, at this part of a large read's rate; packed ones by
# arithmetic too, Mixtral's in w4g128 at 0.78 to 0.86.
READ_PART, PACKED_PART = 0.95, 0.8
SAMPLING_KERNELS = 6
# Between two tokens: an array is filled, a graph started, choices counted, a token told. Where the
# next step is on the stream by then, that is beside a step, and copies and a graph's start remain.
STEP_S = 8.5e-4
STEP_AHEAD_S = 4e-5
# Calls of torch and Triton in a layer where steps are no graph: decoder, routing, copies.
EAGER_CALLS = 45
EAGER_LAYER_S = 1e-4  # the pool is started and awaited from Python
MOST_OFF = 0.25  # of a prediction


@dataclass(frozen=True, slots=True)
class Term:
    """``seconds`` of the sum; ``busy_s``: what it takes, whatever else goes on."""

    name: str
    seconds: float
    busy_s: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A time as its parts."""

    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        """Of them all."""
        return sum(term.seconds for term in self.terms)

    def term(self, name: str) -> Term:
        """The part of that name; one of no time where there is none."""
        return next((term for term in self.terms if term.name == name), Term(name, 0.0, 0.0))


def is_off(times: float) -> bool:
    """Whether something took so many times as long as predicted that it is worth a word."""
    return abs(times - 1) > MOST_OFF


def how_long(times: float) -> str:
    """So many times as long, behind "took"."""
    return f"{times:.2f} times {'as long as' if times > 1 else 'the time'} predicted"


class Sum:
    """Adds up terms by name, in the order in which they first came."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._busy_s: dict[str, float] = defaultdict(float)

    def add(self, name: str, seconds: float, busy_s: float | None = None) -> None:
        """One part; ``busy_s`` None: as long as it counts."""
        self._seconds[name] += seconds
        self._busy_s[name] += seconds if busy_s is None else busy_s

    def add_slower(self, *sides: dict[str, float], weight: float = 1.0) -> None:
        """Sides that work at the same time: the slowest counts, of all of them the work."""
        slowest = max(sides, key=lambda side: sum(side.values()))
        for side in sides:
            for name, seconds in side.items():
                self.add(name, weight * seconds * (side is slowest), weight * seconds)

    def add_all(self, prediction: Prediction, *, weight: float) -> None:
        """The parts of another, so many times."""
        for term in prediction.terms:
            self.add(term.name, weight * term.seconds, weight * term.busy_s)

    def prediction(self) -> Prediction:
        """What has been added."""
        return Prediction(tuple(Term(n, s, self._busy_s[n]) for n, s in self._seconds.items()))


def predict_decode(demand: Demand, rates: MachineRates, *, rows: int, depth: int) -> Prediction:
    """One step that decodes a token of each of ``rows`` requests, ``depth`` tokens into them."""
    total = Sum()
    if not demand.on_gpu:
        return _on_cpu(demand, rates, rows, depth, total)
    read = rates.peaks.gpu_read_gbps * GIGA
    is_graph = demand.disk_share == 0
    kernels = LAYER_KERNELS + (ROUTE_KERNELS if rows > ROUTED_AT_ONCE else 0)
    launches_s = kernels * (rates.launch_s + KERNEL_S)
    if not is_graph:
        launches_s = EAGER_CALLS * rates.call_s + EAGER_LAYER_S
    kv_bytes = rows * depth * demand.kv_bytes
    total.add("GPU dense", demand.num_layers * demand.layer_bytes / (read * READ_PART))
    total.add("launches", demand.num_layers * launches_s)
    total.add("attention", demand.num_layers * kv_bytes / read)
    for layer in demand.layers:
        _gpu_layer(demand, rates, layer, rows, total, pulls=is_graph)
    add_disk(demand, rates, rows, total)
    total.add("head", demand.head_bytes / read)
    total.add("sampling", SAMPLING_KERNELS * rates.launch_s + 3 * 4 * rows * demand.vocab / read)
    total.add("step in Python", STEP_AHEAD_S if is_graph else STEP_S)
    return total.prediction()


def _gpu_layer(
    demand: Demand,
    rates: MachineRates,
    layer: LayerChances,
    rows: int,
    total: Sum,
    *,
    pulls: bool,
) -> None:
    cold, hot = distinct(layer.cold, rows), distinct(layer.hot, rows)
    if layer.cold:
        total.add("hand-over", rates.hand_over_s)
    weight = layer.cold_chance(rows)
    add = partial(add_experts, total, demand, rates, rows=rows, num=hot + cold, pulls=pulls)
    if weight < 1:
        add(num_cold=0.0, weight=1 - weight)
    if weight > 0:
        add(num_cold=cold / weight, weight=weight)


def add_experts(
    total: Sum,
    demand: Demand,
    rates: MachineRates,
    *,
    rows: int,
    num: float,
    num_cold: float,
    pulls: bool = True,
    weight: float = 1.0,
) -> None:
    """A layer's ``num`` distinct experts that ``rows`` tokens choose, of which some are cold."""
    own = gpu_experts_s(demand, rates, max(num - num_cold, 0.0))
    if not num_cold:
        total.add_slower(own, weight=weight)
        return
    cpu_s, pull_s = cold_sides(demand, rates, num_cold, _tokens_each(demand, rows, num), pulls)
    sides = {"cold experts, CPU": cpu_s}, own, {"cold experts, pulled": pull_s}
    total.add_slower(*sides, weight=weight)


def gpu_experts_s(demand: Demand, rates: MachineRates, num: float) -> dict[str, float]:
    """What the GPU takes for so many experts of a layer that it holds, and for the shared one."""
    read = rates.peaks.gpu_read_gbps * GIGA
    part = PACKED_PART if demand.is_packed else READ_PART
    return {
        "hot experts": num * demand.expert_bytes / (read * part),
        "shared expert": demand.shared_bytes / (read * READ_PART),
    }


def cold_sides(
    demand: Demand, rates: MachineRates, num_cold: float, tokens_each: float, pulls: bool
) -> tuple[float, float]:
    """Seconds of the workers and of the link for a layer's cold experts, at least one.

    They are shared as :mod:`offload.cold_share` has them shared, but to the very row.
    """
    costs = rates.share_costs(demand.codes, demand.few, demand.expert_bytes)
    share = _kept_share(costs, num_cold * demand.expert_bytes) if pulls else 1.0
    one_s, each_s = (_expert_s(demand, rates, demand.few, n) for n in (1.0, tokens_each))
    if share < 1:  # as fast as beside the link, or as much slower as more tokens make it
        each_s *= demand.expert_bytes / costs.cpu_bytes_per_s / one_s
    else:
        each_s *= STEP_PART
    cpu_s = num_cold * share * each_s + costs.cpu_start_s
    pulled_bytes = num_cold * (1 - share) * demand.expert_bytes
    if not pulled_bytes:
        return cpu_s, 0.0
    return cpu_s, pulled_bytes / costs.link_bytes_per_s + costs.link_start_s


def _kept_share(costs: ShareCosts, cold_bytes: float) -> float:
    """The part of so many bytes that the workers keep, so that both sides end at once."""
    cpu, link = costs.cpu_bytes_per_s, costs.link_bytes_per_s
    ahead_s = costs.link_start_s - costs.cpu_start_s
    return min(1.0, (cold_bytes / link + ahead_s) / (cold_bytes / link + cold_bytes / cpu))


def _on_cpu(demand: Demand, rates: MachineRates, rows: int, depth: int, total: Sum) -> Prediction:
    """Without a GPU: one thing after the other, all from the same memory."""
    read = rates.peaks.cpu_read_gbps * GIGA
    by_torch = min(read, rates.row_gbps * GIGA or read)
    dense = demand.num_layers * (demand.layer_bytes + demand.shared_bytes)
    total.add("dense", dense / by_torch)
    total.add("calls", demand.num_layers * (EAGER_CALLS * rates.call_s + EAGER_LAYER_S))
    total.add("attention", demand.num_layers * rows * depth * demand.kv_bytes / read)
    for layer in demand.layers:
        hot, cold = distinct(layer.hot, rows), distinct(layer.cold, rows)
        total.add(
            "experts",
            cold * _expert_s(demand, rates, demand.few, _tokens_each(demand, rows, hot + cold)),
        )
        total.add("experts by torch", hot * demand.expert_bytes / read)
    add_disk(demand, rates, rows, total)
    total.add("head", demand.head_bytes / by_torch)
    total.add("step in Python", STEP_S)
    return total.prediction()


def add_disk(demand: Demand, rates: MachineRates, rows: int, total: Sum) -> None:
    """What ``rows`` tokens want from disk first; of one that was not measured nothing is known."""
    if demand.disk_share and rates.disk_gbps:
        cold = sum(distinct(layer.cold, rows) for layer in demand.layers)
        from_disk = demand.disk_share * cold * demand.disk_bytes
        total.add("disk", from_disk / (rates.disk_gbps * GIGA))


def _tokens_each(demand: Demand, rows: int, num_experts: float) -> float:
    return max(1.0, rows * demand.top_k / max(num_experts, 1e-9))


def _expert_s(demand: Demand, rates: MachineRates, activations: str, tokens: float) -> float:
    """One expert on the CPU by its own kernels, with a number of tokens that need not be whole."""
    seconds = rates.expert_s(demand.codes, activations, demand.expert_bytes)
    low = int(tokens)
    return seconds(low, False) + (tokens - low) * (seconds(low + 1, False) - seconds(low, False))


def chunk_sizes(num_tokens: int, step_tokens: int) -> list[int]:
    """The steps in which a prompt is read."""
    full, rest = divmod(num_tokens, step_tokens)
    return [step_tokens] * full + [rest] * (rest > 0)

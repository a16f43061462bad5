"""A plan as a person reads it: what lives where, what a token costs, what to expect."""

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiddler.cli.console import print_trimmed
from fiddler.cli.faster_table import faster_table, rate
from fiddler.cli.memory_bars import bar_lines
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.report.memory_map import memory_map
from offload.hardware import Hardware
from offload.plan import GpuSide, Plan
from offload.units import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from fiddler.advice import Price
    from fiddler.faster import Faster
    from fiddler.speed import RatesHere, Speeds

MOST_REASONS = 3
NAME_WIDTH, SIZE_WIDTH, GAP = 30, 9, 3  # of columns; one blank between them is the box's
GPU_HEADING = {GpuSide.CUDA: "GPU", GpuSide.EMULATED: "GPU side", GpuSide.NONE: "RAM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """A plan with what it was made from; ``missing_bytes`` of the weights are still on the hub.

    ``batch``: requests at once, if that was asked. ``speeds`` None: nothing is predicted.
    ``pulled_share``: the part of a decode step's cold experts that the GPU reads itself.
    ``roomier``: options by which none of them waits for room.
    """

    name: str
    revision: str | None
    missing_bytes: int
    config: ModelConfig
    dtypes: Dtypes
    hardware: Hardware
    plan: Plan
    batch: int | None = None
    speeds: "Speeds | None" = None
    pulled_share: float | None = None
    price: "Price | None" = None
    faster: "Sequence[Faster]" = ()
    roomier: "Sequence[str]" = ()


def print_plan(facts: PlanFacts, console: "Console") -> None:
    """Print two lines of facts, bars, two tables, what to expect, the notes and what would help."""
    print_trimmed(console, _model_line(facts), style="bold")
    print_trimmed(console, _machine_line(facts))
    console.print()
    for bar in bar_lines(memory_map(facts.plan, facts.hardware), console.width):
        print_trimmed(console, bar)
    console.print()
    print_trimmed(console, _memory_table(facts, console.width))
    console.print()
    print_trimmed(console, _token_table(facts.plan, console.width))
    console.print()
    for line in _closing_lines(facts):
        print_trimmed(console, line)
    if facts.faster:
        console.print()
        print_trimmed(console, faster_table(facts.faster))


def _model_line(facts: PlanFacts) -> str:
    config = facts.config
    return (
        f"{facts.name}: {config.num_layers} layers, {config.num_experts} experts, "
        f"{config.top_k} for each token; {facts.dtypes}"
    )


def _machine_line(facts: PlanFacts) -> str:
    plan, hardware = facts.plan, facts.hardware
    ram = f"{size_text(plan.ram_budget_bytes)} of RAM"
    if plan.gpu_side is GpuSide.CUDA:
        return f"{hardware.gpu_name}, {size_text(plan.vram_budget_bytes)} of VRAM; {ram}"
    if plan.gpu_side is GpuSide.EMULATED:
        return f"{hardware.cpu_name}; {size_text(plan.vram_budget_bytes)} as the GPU side; {ram}"
    return f"{hardware.cpu_name}; {ram}"


def _memory_table(facts: PlanFacts, width: int) -> "Table":
    plan, memory = facts.plan, facts.plan.memory
    table = _table("What lives where", plan, width)
    num_experts = facts.config.num_experts * _num_moe_layers(facts.config)
    resident = plan.placement.num_resident
    rows = [
        ("CUDA context", memory.context, 0),
        ("safety margin", memory.margin, 0),
        ("dense weights", memory.dense, memory.cpu_dense),
        (f"KV cache, {plan.num_pages * plan.page_size:,} tokens", memory.kv, 0),
        ("workspace", memory.workspace, memory.cpu_workspace),
        ("staging for prompts", memory.staging, 0),
    ]
    for name, on_gpu, on_cpu in rows:
        if on_gpu + on_cpu:
            _add(table, plan, name, on_gpu, on_cpu)
    experts = f"experts, {resident:,} + {num_experts - resident:,}"
    if plan.gpu_side is GpuSide.NONE:
        experts = f"experts, {num_experts:,}"
    if plan.cached is not None:
        on_disk = num_experts - resident - plan.cached.num_resident
        on_gpu_side = "" if plan.gpu_side is GpuSide.NONE else f"{resident:,} + "
        experts = f"experts, {on_gpu_side}{plan.cached.num_resident:,} + {on_disk:,}"
    _add(table, plan, experts, memory.gpu_experts, memory.cpu_experts, memory.disk_experts)
    if memory.unused:
        _add(table, plan, "unused", memory.unused, 0)
    total = sum(size for _, size, _ in rows) + memory.gpu_experts + memory.unused
    in_ram = memory.cpu_dense + memory.cpu_workspace + memory.cpu_experts
    _add(table, plan, "total", total, in_ram, memory.disk_experts)
    return table


def _token_table(plan: Plan, width: int) -> "Table":
    read = plan.per_token
    table = _table("What one token reads", plan, width)
    cold = read.cold_experts - read.disk_experts
    _add(table, plan, "experts, as expected", read.hot_experts, cold, read.disk_reads)
    _add(table, plan, "dense weights", read.dense, 0)
    _add(table, plan, f"KV cache at {plan.context_tokens:,} tokens", read.kv, 0)
    return table


def _closing_lines(facts: PlanFacts) -> list[str]:
    plan = facts.plan
    lines = [f"Context of one request: {plan.context_tokens:,} tokens", *price_lines(facts)]
    if plan.gpu_side is not GpuSide.NONE:
        lines += _placement_lines(facts)
    lines += choice_lines(facts)
    if facts.speeds is not None:
        lines += [*speed_lines(facts), *rates_lines(facts.speeds.rates)]
    return [*lines, *(f"- {note}" for note in (*plan.notes, *more_notes(facts)))]


def more_notes(facts: PlanFacts) -> list[str]:
    """What is to be known beside the plan's own notes."""
    notes = _waiting_notes(facts)
    if facts.missing_bytes:
        notes.append(f"{size_text(facts.missing_bytes)} are still to be downloaded: fiddler pull")
    return notes


def _waiting_notes(facts: PlanFacts) -> list[str]:
    """Requests that were asked for and find no room."""
    speeds, batch = facts.speeds, facts.batch
    if speeds is None or batch is None or speeds.rows == batch:
        return []
    room = f"; room for all: {' or '.join(facts.roomier)}" if facts.roomier else ""
    return [
        f"the KV cache has room for {speeds.rows:,} of {batch:,} requests of "
        f"{speeds.num_tokens:,} tokens: others wait{room}"
    ]


def price_lines(facts: PlanFacts) -> list[str]:
    """What more context costs."""
    price = facts.price
    if price is None:
        return []
    if not price.experts:
        return [f"{price.tokens:,} more tokens of context take no expert's room"]
    return [
        f"{price.tokens:,} more tokens of context take the room of {price.experts:.1f} experts: "
        f"{price.decode_tokens_per_s:.2g} tok/s"
    ]


def choice_lines(facts: PlanFacts) -> list[str]:
    """What was chosen, and for what."""
    plan = facts.plan
    if plan.gpu_side is not GpuSide.CUDA:
        return []
    ring = f", ring of {plan.staging_slots} experts" if plan.staging_slots else ""
    chosen = ""
    if plan.chosen is not None:
        chosen = f": best of {plan.chosen.num_layouts} for {plan.chosen.objective}"
    return [f"Steps of {plan.step_tokens:,} tokens{ring}{chosen}"]


def speed_lines(facts: PlanFacts) -> list[str]:
    """Speeds beside their limits, and what a decoded token waits for."""
    speeds = facts.speeds
    if speeds is None:
        return []
    of = f" of {speeds.rows:,} requests" if speeds.rows > 1 else ""
    prompts = "a prompt" if speeds.rows == 1 else f"{speeds.rows:,} prompts"
    most_decode = speeds.rows / speeds.decode_limit_s
    most_prefill = speeds.rows * speeds.num_tokens / speeds.prefill_limit_s
    return [
        f"Predicted decode{of} at {speeds.num_tokens:,} tokens: {rate(speeds.decode_rate)} tok/s "
        f"(limit {rate(most_decode)})",
        f"Predicted reading of {prompts} of as many: {rate(speeds.prefill_rate)} tok/s "
        f"(limit {rate(most_prefill)})",
        f"A decoded token waits for {_reasons(speeds)}",
        *_share_lines(facts),
    ]


def _share_lines(facts: PlanFacts) -> list[str]:
    """Who computes cold experts while decoding."""
    pulled = facts.pulled_share
    if pulled is None:
        return []
    return [f"Cold experts of a decode step: {1 - pulled:.0%} by the CPU, {pulled:.0%} by the GPU"]


def _reasons(speeds: "Speeds") -> str:
    """The parts of a step that take most of its time."""
    seconds: dict[str, float] = defaultdict(float)
    for term in speeds.decode.terms:
        seconds[term.name.partition(",")[0]] += term.seconds  # cold experts, by either side
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:MOST_REASONS]
    return "; ".join(f"{name} {part / speeds.decode.seconds:.0%}" for name, part in largest)


def rates_lines(used: "RatesHere") -> list[str]:
    """Whose rates they are, by which a plan is chosen and speeds are predicted."""
    if not used.name:
        return ["- by this machine's rates: measured here"]
    lines = [f"- by the rates of {used.name}: {used.origin}"]
    if used.why_not_own:
        lines.append(f"- {used.why_not_own}: fiddler calibrate")
    return lines


def _placement_lines(facts: PlanFacts) -> list[str]:
    plan, config = facts.plan, facts.config
    sizes = [
        len(experts)
        for layer, experts in enumerate(plan.placement.resident)
        if config.is_moe_layer(layer)
    ]
    span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    hits = f"{plan.expected_hit_rate:.1%} ({plan.popularity_name})"
    return [
        f"Experts on the GPU side: {span} of {config.num_experts} in each layer",
        f"Expected hit rate there: {hits}",
    ]


def _table(title: str, plan: Plan, width: int) -> "Table":
    """Both tables have the same columns; what ``width`` lacks is taken from the names'."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    sizes = [GPU_HEADING[plan.gpu_side]]
    sizes += ["CPU"] if plan.gpu_side is not GpuSide.NONE else []
    sizes += ["disk"] if plan.cached is not None else []
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
    room = width - len(sizes) * (SIZE_WIDTH + GAP)
    table.add_column(title, min_width=max(0, min(NAME_WIDTH, room)))
    for heading in sizes:
        table.add_column(heading, justify="right", min_width=SIZE_WIDTH)
    return table


def _add(table: "Table", plan: Plan, name: str, on_gpu: int, on_cpu: int, on_disk: int = 0) -> None:
    """Add a row; without a GPU side the first two sizes are RAM's."""
    sizes = [on_gpu + on_cpu] if plan.gpu_side is GpuSide.NONE else [on_gpu, on_cpu]
    if plan.cached is not None:
        sizes.append(on_disk)
    table.add_row(name, *(size_text(size) if size else "" for size in sizes))


def _num_moe_layers(config: ModelConfig) -> int:
    return sum(config.is_moe_layer(layer) for layer in range(config.num_layers))

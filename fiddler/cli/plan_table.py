"""A plan as a person reads it: what lives where, what a token costs, what to expect."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from offload.hardware import Hardware
from offload.plan import GpuSide, Plan
from offload.units import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fiddler.speed import RatesHere, Speeds

GPU_HEADING = {GpuSide.CUDA: "GPU", GpuSide.EMULATED: "GPU side", GpuSide.NONE: "RAM"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """A plan with what it was made from; ``missing_bytes`` of the weights are still on the hub.

    ``speeds`` None: nothing is predicted.
    """

    name: str
    revision: str | None
    missing_bytes: int
    config: ModelConfig
    dtypes: Dtypes
    hardware: Hardware
    plan: Plan
    speeds: "Speeds | None" = None


def print_plan(facts: PlanFacts, console: "Console") -> None:
    """Print two lines of facts, two tables, what to expect and the notes."""
    console.print(_model_line(facts), style="bold")
    console.print(_machine_line(facts))
    console.print()
    console.print(_memory_table(facts))
    console.print()
    console.print(_token_table(facts.plan))
    console.print()
    for line in _closing_lines(facts):
        console.print(line)


def _model_line(facts: PlanFacts) -> str:
    config, dtypes = facts.config, facts.dtypes
    dtype = dtypes.compute
    if dtypes.expert != dtypes.compute:
        dtype = f"{dtypes.compute}, experts {dtypes.expert}"
    if dtypes.kv != dtypes.compute:
        dtype += f", KV {dtypes.kv}"
    return (
        f"{facts.name}: {config.num_layers} layers, {config.num_experts} experts, "
        f"{config.top_k} for each token; {dtype}"
    )


def _machine_line(facts: PlanFacts) -> str:
    plan, hardware = facts.plan, facts.hardware
    ram = f"{size_text(plan.ram_budget_bytes)} of RAM"
    if plan.gpu_side is GpuSide.CUDA:
        return f"{hardware.gpu_name}, {size_text(plan.vram_budget_bytes)} of VRAM; {ram}"
    if plan.gpu_side is GpuSide.EMULATED:
        return f"{hardware.cpu_name}; {size_text(plan.vram_budget_bytes)} as the GPU side; {ram}"
    return f"{hardware.cpu_name}; {ram}"


def _memory_table(facts: PlanFacts) -> "Table":
    plan, memory = facts.plan, facts.plan.memory
    table = _table("What lives where", plan)
    num_experts = facts.config.num_experts * _num_moe_layers(facts.config)
    resident = plan.placement.num_resident
    rows = [
        ("CUDA context", memory.context),
        ("safety margin", memory.margin),
        ("dense weights", memory.dense),
        (f"KV cache, {plan.num_pages * plan.page_size:,} tokens", memory.kv),
        ("workspace", memory.workspace),
        ("staging for prompts", memory.staging),
    ]
    for name, size in rows:
        if size:
            _add(table, plan, name, size, 0)
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
    on_gpu = sum(size for _, size in rows) + memory.gpu_experts + memory.unused
    _add(table, plan, "total", on_gpu, memory.cpu_experts, memory.disk_experts)
    return table


def _token_table(plan: Plan) -> "Table":
    read = plan.per_token
    table = _table("What one token reads", plan)
    cold = read.cold_experts - read.disk_experts
    _add(table, plan, "experts, as expected", read.hot_experts, cold, read.disk_experts)
    _add(table, plan, "dense weights", read.dense, 0)
    _add(table, plan, f"KV cache at {plan.context_tokens:,} tokens", read.kv, 0)
    return table


def _closing_lines(facts: PlanFacts) -> list[str]:
    plan = facts.plan
    lines = [f"Context of one request: {plan.context_tokens:,} tokens"]
    if plan.gpu_side is not GpuSide.NONE:
        lines += _placement_lines(facts)
    if facts.speeds is not None:
        lines += _speed_lines(facts.speeds)
    notes = list(plan.notes)
    if facts.missing_bytes:
        notes.append(f"{size_text(facts.missing_bytes)} are still to be downloaded: fiddler pull")
    return [*lines, *(f"- {note}" for note in notes)]


def _speed_lines(speeds: "Speeds") -> list[str]:
    decode, prefill = 1 / speeds.decode.seconds, speeds.num_tokens / speeds.prefill.seconds
    most_decode = 1 / speeds.decode_limit_s
    most_prefill = speeds.num_tokens / speeds.prefill_limit_s
    return [
        f"Predicted decode: {_rate(decode)} tok/s (limit {_rate(most_decode)})",
        f"Predicted prompt of {speeds.num_tokens:,} tokens: {_rate(prefill)} tok/s "
        f"(limit {_rate(most_prefill)})",
        *_rates_lines(speeds.rates),
    ]


def _rates_lines(used: "RatesHere") -> list[str]:
    """Whose rates they are."""
    if not used.name:
        return []
    lines = [f"- by the rates of {used.name}: {used.origin}"]
    if used.why_not_own:
        lines.append(f"- {used.why_not_own}: fiddler calibrate")
    return lines


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


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


def _table(title: str, plan: Plan) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, min_width=30)
    table.add_column(GPU_HEADING[plan.gpu_side], justify="right", min_width=9)
    if plan.gpu_side is not GpuSide.NONE:
        table.add_column("CPU", justify="right", min_width=9)
    if plan.cached is not None:
        table.add_column("disk", justify="right", min_width=9)
    return table


def _add(table: "Table", plan: Plan, name: str, on_gpu: int, on_cpu: int, on_disk: int = 0) -> None:
    """Add a row; without a GPU side the first two sizes are RAM's."""
    sizes = [on_gpu + on_cpu] if plan.gpu_side is GpuSide.NONE else [on_gpu, on_cpu]
    if plan.cached is not None:
        sizes.append(on_disk)
    table.add_row(name, *(size_text(size) if size else "" for size in sizes))


def _num_moe_layers(config: ModelConfig) -> int:
    return sum(config.is_moe_layer(layer) for layer in range(config.num_layers))

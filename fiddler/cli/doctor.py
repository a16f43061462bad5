"""``fiddler doctor``: what this machine has, which path would run, and what to mend."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fiddler.cli.console import output_width
from fiddler.cli.errors import ISA_VARIABLE
from fiddler.wrapping import wrapped

if TYPE_CHECKING:
    from fiddler.cli.doctor_checks import Problem
    from fiddler.cli.doctor_facts import Facts
    from fiddler.cli.doctor_memory import Cache
    from fiddler.cli.doctor_problem import Cost

HANDOFFS = {
    "kernel": "kernel: the GPU's kernels ring and await the CPU workers inside a graph",
    "values": "values: the GPU's stream rings and awaits the CPU workers inside a graph",
    "hostfunc": "hostfunc: the driver's host functions ring and await the CPU workers in a graph",
    "eager": "eager: Python rings and awaits the CPU workers, without a graph",
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Check this machine. The exit code is 1 if fiddler cannot run here.

    What can be mended stands beside what it costs in tokens a second, where rates tell.
    """
    from fiddler.cli.doctor_checks import execution_path, find_problems
    from fiddler.cli.doctor_facts import collect

    facts = collect()
    problems, path = _priced(facts, find_problems(facts)), execution_path(facts)
    if as_json:
        record = facts.to_dict() | {"path": path, "problems": [asdict(p) for p in problems]}
        click.echo(json.dumps(record, indent=1))
    else:
        _print(facts_rows(facts) | {"path": path}, problems)
    if any(problem.is_fatal for problem in problems):
        ctx.exit(1)


def facts_rows(facts: "Facts") -> dict[str, str]:
    """The facts in the words of a table; what is not known is left out."""
    packages = [f"{name} {version or 'missing'}" for name, version in facts.packages.items()]
    rows = {
        "fiddler": f"{facts.fiddler}, Python {facts.python}, {facts.system}",
        "packages": ", ".join(packages),
        "CUDA": _cuda(facts),
        "GPU": _gpu(facts),
        "KV cache": _kv_types(facts),
        "PCIe": _link(facts),
        "hand-off": HANDOFFS.get(facts.handoff or "", ""),
        "CPU": _joined(facts.cpu, _count(facts.physical_cores, "core")),
        "ISA": _joined(facts.isa, facts.forced_isa and f"forced by {ISA_VARIABLE}"),
        "workers": f"{facts.num_workers} (measured)" if facts.num_workers else "",
        "NUMA": _joined(
            _count(facts.numa_nodes, "node"),
            None if facts.gpu_node is None else f"the GPU at node {facts.gpu_node}",
        ),
        "RAM": _part(facts.ram_available_bytes, facts.ram_total_bytes),
        "pages": _pages(facts),
        "caches": ", ".join(_cache(*named) for named in facts.caches.items()),
        "rates": f"of {facts.rates_of}" if facts.rates_of else "",
        "models": _joined(facts.cache, _free(facts.cache_free_bytes)),
    }
    return {name: text for name, text in rows.items() if text}


def _print(rows: dict[str, str], problems: "list[Problem]") -> None:
    width = max(map(len, rows))
    for name, text in rows.items():
        _echo(f"{name:<{width}}  ", text)
    if not problems:
        click.echo("\nno problems found")
    for problem in problems:
        click.echo()
        _echo(f"{'problem' if problem.is_fatal else 'warning'}: ", problem.what)
        if problem.effect:
            _echo("  effect: ", problem.effect)
        if problem.cost:
            _echo("  speed: ", cost_text(problem.cost))
        _echo("  do: ", problem.todo)


def _priced(facts: "Facts", problems: "list[Problem]") -> "list[Problem]":
    """With what they cost, where there is such a one and this machine could be looked at."""
    is_asked = any(problem.mend for problem in problems)
    if not is_asked or facts.seen is None or any(p.is_fatal for p in problems):
        return problems
    from fiddler.cli.doctor_cost import whole_rates, with_costs
    from fiddler.cli.doctor_facts import unsaid

    seen, whole = facts.seen, None
    if facts.is_lesser_isa:
        with unsaid():  # the findings tell it
            whole = whole_rates(seen.hardware)
    return with_costs(problems, seen.hardware, seen.used, whole)


def cost_text(cost: "Cost") -> str:
    """As ``writes 23.1 tok/s instead of 25.1, reads 610 tok/s (SHAPE)``."""
    from fiddler.cli.faster_table import rate

    pairs = (cost.decode, cost.mended_decode), (cost.prefill, cost.mended_prefill)
    of = cost.shape
    if cost.machine != "this machine":
        of += f", by the rates of {cost.machine}"
    written, read = ([rate(one) for one in pair] for pair in pairs)
    texts = [f"{n} tok/s" if n == m else f"{n} tok/s instead of {m}" for n, m in (written, read)]
    return f"writes {texts[0]}, reads {texts[1]} ({of})"


def _echo(label: str, text: str) -> None:
    for line in wrapped(label, text, output_width()):
        click.echo(line)


def _cuda(facts: "Facts") -> str:
    driver = f"driver {facts.driver or 'of unknown version'}"
    if facts.driver_cuda:
        driver += f" (up to CUDA {facts.driver_cuda})"
    has_driver = facts.driver or facts.driver_cuda
    built = f"torch built for {facts.torch_cuda or 'the CPU'}" if facts.packages["torch"] else None
    return _joined(driver if has_driver else "no NVIDIA driver", built)


def _gpu(facts: "Facts") -> str:
    gpu = facts.gpu
    if gpu is None:
        return "none"
    count = f"{gpu.count} x " if gpu.count > 1 else ""
    memory = _part(gpu.vram_free_bytes, gpu.vram_total_bytes)
    return _joined(f"{count}{gpu.name}", memory, f"capability {gpu.capability}")


def _link(facts: "Facts") -> str:
    link = facts.link
    if link is None:
        return ""
    now = f"generation {link.generation} x{link.width} under load" if link.width else None
    most = f"at most {link.max_generation} x{link.max_width}" if link.max_width else None
    return _joined(now, most, f"copies at {link.copy_gbps:.1f} GB/s")


def _pages(facts: "Facts") -> str:
    from offload.units import size_text

    if facts.huge_pages is None:
        return ""
    locked = "any number" if facts.memlock_bytes is None else size_text(facts.memlock_bytes)
    return f"huge ones: {facts.huge_pages}; {locked} may be locked"


def _cache(name: str, cache: "Cache") -> str:
    from offload.units import size_text

    return f"{name} {size_text(cache.num_bytes)} in {cache.folder}"


def _kv_types(facts: "Facts") -> str:
    """Values of --kv-dtype that work on the GPU; without one all do."""
    from fiddler.config import KV_CACHE_DTYPES
    from fiddler.models.dtypes import FP8_CAPABILITY

    if facts.gpu is None:
        return ""
    has_fp8 = tuple(map(int, facts.gpu.capability.split("."))) >= FP8_CAPABILITY
    return ", ".join(kind for kind in KV_CACHE_DTYPES[1:] if has_fp8 or kind != "fp8")


def _joined(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)


def _count(number: int | None, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}" if number else ""


def _part(free_bytes: int | None, total_bytes: int | None) -> str:
    from offload.units import size_text

    if free_bytes is None or total_bytes is None:
        return ""
    return f"{size_text(free_bytes)} of {size_text(total_bytes)} free"


def _free(free_bytes: int | None) -> str:
    from offload.units import size_text

    return "" if free_bytes is None else f"{size_text(free_bytes)} free"

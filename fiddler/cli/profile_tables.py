"""What a profile shows, as text for people and as JSON for programs."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from fiddler.held_out import HitRates, ProfileResult


def print_result(result: "ProfileResult") -> None:
    """The heatmap, entropies and the hit rates."""
    from fiddler.cli.console import echo, output_console
    from fiddler.cli.expert_heatmap import heatmap_lines
    from fiddler.report.entropy import entropy_line

    console = output_console()
    counts = result.profile.popularity.counts_LE.tolist()
    for line in heatmap_lines(counts, width=min(console.width, 100)):
        console.print(line)
    echo(entropy_line(result.profile.popularity, result.moe_layers))
    console.print(
        f"\nHit rate on {result.held_out_tokens:,} held-out tokens, "
        f"placed by the other {result.profile.num_tokens:,}:\n"
    )
    headings = ("this profile", "at 95 %", "no profile", "best")
    table = rate_table("experts on the GPU side", *headings)
    total = len(result.moe_layers) * len(counts[0])
    for label, rates in _rows(result):
        span = f"{100 * rates.low:.1f}-{rates.high:.1%}"
        shown = [f"{rate:.1%}" for rate in (rates.profile, rates.uniform, rates.best)]
        shown.insert(1, span)
        table.add_row(f"{rates.num_resident:,} of {total:,}{label}", *shown)
    console.print(table)


def rate_table(first: str, *headings: str) -> "Table":
    """An empty table: names on the left, figures on the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")  # no figure loses its end
    return table


def record_of(result: "ProfileResult") -> dict[str, Any]:
    """The figures as JSON types."""
    profile = result.profile
    return {
        "model": profile.model,
        "revision": profile.revision,
        "corpus_sha256": profile.corpus_sha256,
        "num_tokens": profile.num_tokens,
        "held_out_tokens": result.held_out_tokens,
        "entropy_bits": profile.popularity.entropy_bits(),
        "present": dataclasses.asdict(result.present),
        "by_share": [dataclasses.asdict(rates) for rates in result.by_share],
    }


def _rows(result: "ProfileResult") -> list[tuple[str, "HitRates"]]:
    """The present budget's rates first, if it has a GPU side, then the fixed shares'."""
    present = [(", this VRAM budget", result.present)] if result.present.num_resident else []
    return [*present, *(("", rates) for rates in result.by_share)]

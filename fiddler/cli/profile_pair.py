"""``fiddler profile --compare`` and ``--merge``: two profiles, no model."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fiddler.cli.console import note, output_console
from fiddler.cli.profile_outputs import Output, check_outputs
from fiddler.cli.profile_tables import rate_table

if TYPE_CHECKING:
    from offload.profile_pair import Comparison


def compare_files(first: Path, second: Path, *, as_json: bool) -> None:
    """Tell how alike two profiles are, and what the first is worth on the second's text."""
    from offload.popularity import read_profile
    from offload.profile_pair import compare

    profiles = [read_profile(path) for path in (first, second)]
    comparison = compare(*profiles)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(comparison)))
        return
    total = len(comparison.layers) * profiles[0].popularity.counts_LE.shape[1]
    files = zip((first, second), profiles, strict=True)
    _print(comparison, [f"{path.name}, {profile.name}" for path, profile in files], total)


def merge_files(first: Path, second: Path, output: Output, *, as_json: bool) -> None:
    """Write a profile with the counts of both."""
    from offload.popularity import read_profile, save_profile
    from offload.profile_pair import merge

    profiles = [read_profile(path) for path in (first, second)]
    check_outputs(dict.fromkeys((first, second), "is one of the two"), [output])
    merged = merge(*profiles)
    save_profile(merged, output.path)
    note(f"wrote {output.path}")
    if as_json:
        record = {"model": merged.model, "num_tokens": merged.num_tokens}
        click.echo(json.dumps(record | {"entropy_bits": merged.popularity.entropy_bits()}))
    else:
        click.echo(f"{merged.model}: {merged.name}")


def _print(comparison: "Comparison", names: list[str], total: int) -> None:
    console = output_console()
    console.print(f"A: {names[0]}\nB: {names[1]}\n")
    layers = rate_table("layer", "busiest quarter shared", "divergence, bits")
    for layer in comparison.layers:
        layers.add_row(str(layer.layer), f"{layer.overlap:.0%}", f"{layer.divergence_bits:.4f}")
    console.print(layers)
    console.print("\nShare of B's routes that meet an expert on the GPU side, placed\n")
    rates = rate_table("experts on the GPU side", "by A", "by B itself", "without either")
    for row in comparison.transfers:
        shown = (f"{rate:.1%}" for rate in (row.first, row.second, row.uniform))
        rates.add_row(f"{row.num_resident:,} of {total:,}", *shown)
    console.print(rates)

"""``fiddler profile``: count which experts a text or chat file uses, for better placement."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiddler.cli import session
from fiddler.cli.console import note
from fiddler.cli.options import engine_options
from fiddler.cli.profile_outputs import check_outputs
from fiddler.cli.progress import progress_bars

if TYPE_CHECKING:
    from fiddler.corpus import Corpus
    from fiddler.profiling import ProfiledModel, ProfileResult


@click.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="A UTF-8 text.")
@click.option(
    "--chat",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A saved chat, or JSON or JSONL of messages.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("profile.json"),
    show_default=True,
    metavar="FILE",
    help="Where the profile goes.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw a heatmap as .png or .svg.",
)
@click.option(
    "--held-out", type=float, default=0.2, show_default=True, help="Share kept apart to judge by."
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@engine_options
def command(
    model: str,
    text: Path | None,
    chat: Path | None,
    output: Path,
    picture: Path | None,
    held_out: float,
    as_json: bool,
    engine: dict[str, Any],
) -> None:
    """Run a text or a chat through MODEL and count which experts its tokens are routed to.

    Writes a profile for --profile, and tells how many routes of unseen text it would put on the
    GPU within the VRAM budget.
    """
    from fiddler.heatmap import check_picture, save_picture
    from fiddler.profiling import check_held_out, profile_corpus
    from offload.popularity import check_writable, save_profile

    corpus = _read_corpus(text, chat)
    check_held_out(held_out)
    check_writable(output)
    if picture is not None:
        check_picture(picture)
    check_outputs([path for path in (text, chat) if path], output, picture)
    with contextlib.closing(session.open_llm(model=model, **engine)) as llm, progress_bars() as bar:
        result = profile_corpus(
            cast("ProfiledModel", llm),
            corpus,
            held_out=held_out,
            on_progress=functools.partial(bar, "profiling tokens") if bar else None,
        )
    save_profile(result.profile, output)
    note(f"wrote {output}")
    if picture is not None:
        save_picture(result, picture)
        note(f"wrote {picture}")
    if as_json:
        click.echo(json.dumps(_record(result)))
    else:
        _print(result)


def _read_corpus(text: Path | None, chat: Path | None) -> "Corpus":
    from fiddler.corpus import read_chat_corpus, read_text_corpus

    if (text is None) == (chat is None):
        raise click.UsageError("give either --text FILE or --chat FILE")
    return read_text_corpus(text) if text is not None else read_chat_corpus(cast(Path, chat))


def _print(result: "ProfileResult") -> None:
    """The heatmap and the hit rates."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fiddler.cli.console import output_console
    from fiddler.cli.expert_heatmap import heatmap_lines

    console = output_console()
    counts = result.profile.popularity.counts_LE.tolist()
    for line in heatmap_lines(counts, width=min(console.width, 100)):
        console.print(line)
    console.print(
        f"\nHit rate on {result.held_out_tokens:,} held-out tokens, "
        f"placed by the other {result.profile.num_tokens:,}:\n"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("experts on the GPU side")
    for heading in ("this profile", "no profile", "best possible"):
        table.add_column(heading, justify="right")
    total = len(result.moe_layers) * len(counts[0])
    for label, rates in _rows(result):
        shown = [f"{rate:.1%}" for rate in (rates.profile, rates.uniform, rates.best)]
        table.add_row(f"{rates.num_resident:,} of {total:,}{label}", *shown)
    console.print(table)


def _rows(result: "ProfileResult") -> list[tuple[str, Any]]:
    """The present budget's rates first, if it has a GPU side, then the fixed shares'."""
    present = [(", this VRAM budget", result.present)] if result.present.num_resident else []
    return [*present, *(("", rates) for rates in result.by_share)]


def _record(result: "ProfileResult") -> dict[str, Any]:
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

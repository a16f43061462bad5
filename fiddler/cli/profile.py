"""``fiddler profile``: count which experts a text or chat file uses, for better placement."""

import contextlib
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiddler.cli import session
from fiddler.cli.console import note
from fiddler.cli.options import engine_options, model_argument
from fiddler.cli.page_file import html_option, write_page
from fiddler.cli.profile_outputs import (
    Output,
    check_outputs,
    page_output,
    picture_output,
    profile_output,
    trace_output,
)
from fiddler.cli.profile_pair import compare_files, merge_files
from fiddler.cli.profile_tables import print_result, record_of
from fiddler.progress import progress_bars

if TYPE_CHECKING:
    from fiddler.corpus import Corpus
    from fiddler.held_out import ProfileResult
    from fiddler.llm import LLM
    from offload.demand import Demand
    from offload.plan import Footprint
    from offload.routing_trace import RoutingTrace

FILE = click.Path(path_type=Path)


@click.command()
@model_argument(is_needed=False)
@click.option("--text", type=FILE, metavar="FILE", help="A UTF-8 text.")
@click.option(
    "--chat",
    "--from-chat",
    "chat",
    type=FILE,
    metavar="FILE",
    help="A saved chat, or JSON(L) of messages.",
)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("profile.json"),
    show_default=True,
    metavar="FILE",
    help="Where the profile goes.",
)
@click.option("--picture", type=FILE, metavar="FILE", help="Draw a heatmap as .png or .svg.")
@html_option("Write the figures as one page.")
@click.option(
    "--trace", type=FILE, metavar="FILE", help="Keep every token's experts, for fiddler simulate."
)
@click.option(
    "--held-out", type=float, default=0.2, show_default=True, help="Share kept apart to judge by."
)
@click.option(
    "--compare", type=FILE, nargs=2, metavar="A B", help="Tell how two profiles differ instead."
)
@click.option("--merge", type=FILE, nargs=2, metavar="A B", help="Add two profiles up instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@engine_options
@click.pass_context
def command(
    ctx: click.Context,
    model: str | None,
    text: Path | None,
    chat: Path | None,
    output: Path,
    picture: Path | None,
    html: Path | None,
    trace: Path | None,
    held_out: float,
    compare: tuple[Path, Path] | None,
    merge: tuple[Path, Path] | None,
    as_json: bool,
    engine: dict[str, Any],
) -> None:
    """Run a text or a chat through MODEL and count which experts its tokens are routed to.

    Writes a profile for --profile, and tells how many routes of unseen text it would put on the
    GPU within the VRAM budget. --compare and --merge take two profiles and no model.
    """
    default = click.core.ParameterSource.DEFAULT
    profile = profile_output(output, is_named=ctx.get_parameter_source("output") is not default)
    if compare or merge:
        _check_alone(ctx, "--compare" if compare else "--merge")
        if compare:
            compare_files(*compare, as_json=as_json)
        else:
            merge_files(*cast(tuple[Path, Path], merge), profile, as_json=as_json)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.", ctx)
    outputs = [profile]
    if picture is not None:
        from fiddler.heatmap import check_picture

        check_picture(picture)
        outputs.append(picture_output(picture))
    if html is not None:
        outputs.append(page_output(html))
    if trace is not None:
        outputs.append(trace_output(trace))
    corpus = _read_corpus(text, chat)
    result, recorded = _profile(model, corpus, held_out, outputs, cast(Path, text or chat), engine)
    _write(result, recorded, {output.option: output.path for output in outputs})
    if as_json:
        click.echo(json.dumps(record_of(result)))
    else:
        print_result(result)


def _check_alone(ctx: click.Context, option: str) -> None:
    """Two profiles need nothing else: what is given beside them would be ignored."""
    allowed = {"compare", "merge", "as_json"} - {"merge" if option == "--compare" else "compare"}
    if option == "--merge":
        allowed.add("output")
    default = click.core.ParameterSource.DEFAULT
    for parameter in ctx.command.params:
        name = parameter.name
        if name not in allowed and ctx.get_parameter_source(name) is not default:
            shown = "MODEL" if name == "model" else parameter.opts[0]
            raise click.UsageError(f"{option} takes two profiles and no {shown}", ctx)


def _profile(
    model: str,
    corpus: "Corpus",
    held_out: float,
    outputs: list[Output],
    source: Path,
    engine: dict[str, Any],
) -> "tuple[ProfileResult, RoutingTrace | None]":
    """The result, and the trace if it is to be written."""
    from fiddler.profiling import ProfiledModel, check_held_out, profile_corpus
    from offload.popularity import check_writable
    from offload.routing_trace import TraceRecorder

    check_held_out(held_out)
    check_writable(outputs[0].path)
    check_outputs({source: "is the corpus"}, outputs)
    is_traced = any(output.option == "--trace" for output in outputs)
    with contextlib.closing(session.open_llm(model=model, **engine)) as llm, progress_bars() as bar:
        recorder = TraceRecorder(*_sizes(cast("LLM", llm))) if is_traced else None
        result = profile_corpus(
            cast(ProfiledModel, llm),
            corpus,
            held_out=held_out,
            on_progress=functools.partial(bar, "profiling tokens") if bar else None,
            on_window=recorder,
        )
        if recorder is None:
            return result, None
        return result, recorder.trace(llm.model_name, llm.revision, corpus.sha256)


def _sizes(llm: "LLM") -> "tuple[Footprint, Demand]":
    """What a simulation has to know of a model that it does not load."""
    from fiddler.models.footprint import footprint
    from fiddler.planning import STEP_TOKENS
    from fiddler.speed import bare_demand

    dtypes = llm.dtypes
    sizes = footprint(
        llm.model_config,
        dtypes,
        max_batched_tokens=STEP_TOKENS,
        max_num_seqs=1,
    )
    return sizes, bare_demand(llm.model_config, dtypes)


def _write(
    result: "ProfileResult", recorded: "RoutingTrace | None", paths: dict[str, Path]
) -> None:
    from offload.popularity import save_profile

    save_profile(result.profile, paths["-o"])
    if "--picture" in paths:
        from fiddler.heatmap import save_picture

        save_picture(result, paths["--picture"])
    if "--html" in paths:
        from fiddler.report.pages import profile_page

        write_page(paths["--html"], profile_page(result))
    if recorded is not None:
        from offload.routing_trace import save_trace

        save_trace(recorded, paths["--trace"])
    for option, path in paths.items():
        if option != "--html":
            note(f"wrote {path}")


def _read_corpus(text: Path | None, chat: Path | None) -> "Corpus":
    from fiddler.corpus import read_chat_corpus, read_text_corpus

    if (text is None) == (chat is None):
        raise click.UsageError("give either --text FILE or --chat FILE")
    return read_text_corpus(text) if text is not None else read_chat_corpus(cast(Path, chat))

"""``fiddler bench``: llama-bench's tests, each beside what the machine could give."""

import json
import re
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fiddler.cli.calibrated import renew_calibration
from fiddler.cli.console import note, output_width
from fiddler.cli.options import (
    COUNT,
    Decorator,
    check_shape_options,
    model_argument,
    some_engine_options,
)
from fiddler.cli.page_file import check_page, html_option, write_page
from fiddler.cli.written_file import check_apart, check_file, write_file
from fiddler.config import BUILTIN, EngineConfig
from fiddler.errors import FiddlerError, reject_unknown
from fiddler.progress import progress_bars

if TYPE_CHECKING:
    from fiddler.benchmark.cases import Case
    from fiddler.benchmark.driver import Measurement
    from fiddler.benchmark.record import Record, Setting
    from fiddler.benchmark.subject import Subject
    from fiddler.loading import LoadedModel
    from offload.hardware import Hardware
    from offload.machine_rates import MachineRates
    from offload.routing_law import Law

ENGINE_FIELDS = (
    "vram_gb",
    "ram_gb",
    "dtype",
    "kv_cache_dtype",
    "cpu_activations",
    "device",
    "objective",
    "cpu_threads",
    "profile",
    "placement_policy",
    "seed",
)


class Counts(click.ParamType[list[int]]):
    """Whole numbers with commas between them."""

    name = "counts"

    def __init__(self, least: int) -> None:
        self._least = least

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) >= self._least for part in parts):
            self.fail(f"{value!r} is not a list of numbers from {self._least} on, as in 512,2048")
        return [int(part) for part in parts]


class Pair(click.ParamType[tuple[int, int]]):
    """Two whole numbers above 0 with a comma between them."""

    name = "pair"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        prompt, _, answer = str(value).partition(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in (prompt, answer)):
            self.fail(f"{value!r} is not a prompt's and an answer's length, as in 512,128")
        return int(prompt), int(answer)


def counts_option(*names: str, default: str, least: int, help: str) -> Decorator:
    """An option that takes several values, also by being repeated; each of them is tested."""
    return click.option(
        *names,
        type=Counts(least),
        multiple=True,
        default=[default],
        show_default=True,
        metavar="N,...",
        callback=lambda ctx, param, lists: [*chain.from_iterable(lists)],
        help=help,
    )


@click.command()
@model_argument(is_needed=False)
@click.option("--shape", metavar="NAME", help="A named shape with seeded weights instead.")
@counts_option("-p", "--n-prompt", default="512", least=0, help="Read a prompt of N tokens.")
@counts_option("-n", "--n-gen", default="128", least=0, help="Write N tokens.")
@click.option(
    "-pg",
    "pairs",
    type=Pair(),
    multiple=True,
    metavar="P,N",
    help="Read P and then write N tokens; may be repeated.",
)
@counts_option("-d", "--n-depth", default="0", least=0, help="Behind N tokens in the cache.")
@counts_option("--batch", default="1", least=1, help="N requests at once.")
@click.option(
    "-r",
    "--repetitions",
    type=COUNT,
    default=5,
    show_default=True,
    metavar="N",
    help="Runs that count.",
)
@click.option(
    "--routing",
    default="model",
    show_default=True,
    metavar="LAW",
    help="Who chooses experts: model, or at random: uniform, zipf:S, sticky:P, drift:N.",
)
@click.option(
    "-o",
    "--output",
    type=click.Choice(["md", "json", "csv"]),
    default="md",
    show_default=True,
    help="Form of the result.",
)
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a timeline of two steps, for ui.perfetto.dev.",
)
@html_option("Write the figures and a roofline as one page.")
@some_engine_options(*ENGINE_FIELDS)
def command(
    model: str | None,
    shape: str | None,
    n_prompt: list[int],
    n_gen: list[int],
    pairs: tuple[tuple[int, int], ...],
    n_depth: list[int],
    batch: list[int],
    repetitions: int,
    routing: str,
    output: str,
    trace_path: Path | None,
    html: Path | None,
    engine: dict[str, Any],
) -> None:
    """Measure how fast MODEL reads and writes, beside what the machine could give.

    It is 'builtin', which is the default, a folder, or ORG/NAME[@REVISION] on the hub.

    Tests are llama-bench's: pp512 reads a prompt of 512 tokens, tg128 writes 128, pp512+tg128 does
    both, "@ d4096" behind 4,096 others. -p 0 or -n 0 leaves one kind out; what takes N,... may be
    repeated as well. "t/s" is the median of the runs. "limit" is the speed at which the weights
    and the KV cache could be read, or a prompt's products computed, with the bandwidths of this
    run; "predicted" is what the figures of fiddler calibrate promise, and a line below says what is
    wrong where that is far off. --trace also writes what engine, CPU workers and GPU did in one
    step that reads and in one that writes.
    """
    from fiddler.benchmark.build import build_commit
    from fiddler.benchmark.cases import make_cases
    from fiddler.benchmark.record import Setting, record_of
    from fiddler.benchmark.report import render
    from fiddler.models.shapes import SHAPES
    from offload.peaks import measure_peaks
    from offload.routing_law import parse_law

    if model and shape:
        raise click.UsageError("give either MODEL or --shape NAME, not both")
    reject_unknown("shape", [shape] if shape else [], SHAPES)
    check_shape_options(shape, engine)
    law = parse_law(routing)
    _check_files(trace_path, html, engine.get("profile"))
    cases = make_cases(n_prompt, n_gen, pairs, n_depth, batch)
    settings = EngineConfig(
        model=shape or model or BUILTIN,
        load_format="dummy" if shape else "auto",
        prefix_caching=False,
        max_model_len=max(case.length for case in _all_cases(cases, trace_path is not None)),
        max_num_seqs=max(case.n_parallel for case in cases),
        **engine,
    )
    is_traced = trace_path is not None
    subject, rates, measured, timeline = _measure(settings, cases, law, repetitions, is_traced)
    note("measuring what the machine could give")
    peaks = measure_peaks(
        subject.hardware, num_threads=subject.num_threads, dtype=subject.dtypes.compute
    )
    peaks = rates.at_most(peaks) if rates is not None else peaks
    setting = Setting(
        subject=subject, peaks=peaks, routing=routing, build=build_commit(), rates=rates
    )
    records = [record_of(runs, setting, wrong) for runs, wrong in measured]
    click.echo(render(records, output, width=output_width()))
    if trace_path is not None:
        _write_timeline(trace_path, timeline, subject.hardware)
    if html is not None:
        _write_page(html, setting, [runs for runs, _ in measured], records)


def _check_files(trace_path: Path | None, html: Path | None, profile: str | None) -> None:
    """Raise ConfigError if a file cannot be written, or would be written over another one."""
    taken = {} if profile is None else {Path(profile): "is the profile"}
    if trace_path is not None:
        check_apart("--trace", trace_path, taken)
        check_file("--trace", trace_path)
        taken[trace_path] = "is where the timeline goes"
    check_page(html, taken)


def _known_rates(hardware: "Hardware") -> "MachineRates | None":
    """What this machine has been measured as; says why there is nothing, if so."""
    from fiddler.speed import own_rates

    rates, why_not = own_rates(hardware)
    if rates is None:
        note(f"no predictions: {why_not}; fiddler calibrate measures it")
    return rates


def _write_page(
    path: Path, setting: "Setting", measurements: "list[Measurement]", records: "list[Record]"
) -> None:
    from fiddler.benchmark.report import cells, notes
    from fiddler.benchmark.roofline import points_of, roofs_of
    from fiddler.report.page import Table
    from fiddler.report.pages import bench_page

    subject = setting.subject
    headings, rows = cells(records)
    text = bench_page(
        f"{subject.name}: measured speed",
        notes(records),
        roofs_of(setting.peaks),
        points_of(subject, measurements),
        Table(tuple(headings), tuple(map(tuple, rows))),
    )
    write_page(path, text)


def _measure(
    settings: EngineConfig,
    cases: "list[Case]",
    law: "Law | None",
    repetitions: int,
    is_traced: bool,
) -> "tuple[Subject, MachineRates | None, list[tuple[Measurement, str]], dict[str, Any]]":
    """Each test's runs, what is wrong with what the rates predict of them if much is, a timeline.

    The model is gone when this returns, so the machine can be measured in its memory.
    """
    from fiddler.benchmark.driver import Driver
    from fiddler.benchmark.record import tokens_per_s
    from fiddler.benchmark.routing import DrawnRouting
    from fiddler.benchmark.subject import Subject
    from fiddler.benchmark.trace import trace, trace_case
    from fiddler.benchmark.watched import what_is_wrong

    renew_calibration()
    loaded = _load(settings, _all_cases(cases, is_traced))
    rates = _known_rates(loaded.hardware)
    measured: list[tuple[Measurement, str]] = []
    with loaded.resources:
        config, seed = loaded.files.config, settings.seed
        routing = None if law is None else DrawnRouting(law, config, seed=seed)
        driver = Driver(loaded, routing=routing, seed=seed)
        for case in cases:
            runs = driver.measure(case, repetitions)
            measured.append((runs, what_is_wrong(loaded, driver, runs, rates, law)))
            median, deviation = tokens_per_s(runs)
            note(f"{case.name}, batch {case.n_parallel}: {median:.2f} ± {deviation:.2f} tok/s")
        timeline = trace(loaded, driver, trace_case(cases)) if is_traced else {}
    return Subject.of(loaded), rates, measured, timeline


def _all_cases(cases: "list[Case]", is_traced: bool) -> "list[Case]":
    from fiddler.benchmark.trace import trace_case

    return [*cases, trace_case(cases)] if is_traced else cases


def _write_timeline(path: Path, timeline: dict[str, Any], hardware: "Hardware") -> None:
    from fiddler.benchmark.trace import has_gpu_rows

    write_file(path, json.dumps(timeline))
    note(f"wrote {path}; open it at https://ui.perfetto.dev")
    if hardware.has_gpu and not has_gpu_rows(timeline):
        note("it has no rows of the GPU: torch's profiler gave none, for which it needs CUPTI")


def _load(settings: EngineConfig, cases: "list[Case]") -> "LoadedModel":
    from fiddler.benchmark.driver import load

    try:
        with progress_bars() as progress:
            return load(settings, cases, progress)
    except FiddlerError as error:  # this command has no --context: the tests make it up
        error.hint = re.sub(r"--context (\d+)", r"-p or -n, with -d, of \1", error.hint)
        raise

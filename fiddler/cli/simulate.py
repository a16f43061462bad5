"""``fiddler simulate``: which placement policy suits which routes, without a GPU or a model."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from fiddler.cli.calibrated import renew_calibration
from fiddler.cli.console import note
from fiddler.cli.option_types import Dtype, Number
from fiddler.cli.options import COUNT, GIB
from fiddler.cli.simulate_table import print_prediction, print_verdicts
from fiddler.errors import ConfigError
from fiddler.progress import progress_bars
from offload.units import counted

if TYPE_CHECKING:
    from fiddler.simulating import Routes
    from fiddler.speed import RatesHere
    from offload.hardware import Hardware
    from offload.limits import Peaks
    from offload.popularity import Profile
    from offload.routing_trace import RoutingTrace

SHARES = (0.125, 0.25, 0.5)  # of all experts, where no budget is given
ROUTING = "zipf:1.2"
TRAIN = 0.25
OF_SHAPES = ("routing", "num_tokens", "dtype", "seed")


class Rates(click.ParamType[tuple[float, float, float]]):
    """Three rates above 0 with commas between them."""

    name = "rates"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float, float]:
        try:
            host, link, gpu = map(float, str(value).split(","))
        except ValueError:
            host = link = gpu = 0.0
        if not all(0 < rate < float("inf") for rate in (host, link, gpu)):
            self.fail(f"{value!r} is not three rates above 0, as in 155,50,3300")
        return host, link, gpu


@click.command()
@click.argument("trace", type=click.Path(path_type=Path), required=False)
@click.option("--shape", metavar="NAME", help="A named shape with drawn routes instead.")
@click.option(
    "--routing",
    metavar="LAW",
    default=ROUTING,
    show_default=True,
    help="With --shape: uniform, zipf:S, sticky:P or drift:N.",
)
@click.option(
    "--tokens",
    "num_tokens",
    type=COUNT,
    default=2048,
    show_default=True,
    metavar="N",
    help="With --shape: how many.",
)
@click.option("--dtype", type=Dtype(), metavar="TYPE", default="auto", help="With --shape.")
@click.option("--seed", type=int, default=0, metavar="N", help="With --shape.")
@click.option(
    "--slots", type=COUNT, multiple=True, metavar="N", help="Experts on the GPU; may be repeated."
)
@click.option(
    "--vram-gb",
    type=GIB,
    multiple=True,
    metavar="GIB",
    help="As many as fit there; may be repeated.",
)
@click.option(
    "--batch", type=COUNT, default=1, show_default=True, metavar="N", help="Requests at once."
)
@click.option("--profile", type=click.Path(path_type=Path), metavar="FILE", help="Place by it.")
@click.option(
    "--train",
    type=Number(0, 0.9),
    default=TRAIN,
    show_default=True,
    metavar="SHARE",
    help="Without --profile: place by the first routes, play the others.",
)
@click.option(
    "--gbps",
    type=Rates(),
    metavar="HOST,PCIE,GPU",
    help="GB/s of host memory, PCIe and GPU memory: their limit, and no prediction.",
)
@click.option(
    "--hardware",
    "machine_name",
    metavar="FILE|NAME",
    help="Predict for another machine, as fiddler plan does.",
)
@click.option(
    "--copy-share",
    type=Number(0, 1),
    metavar="SHARE",
    help="Of a step's time, for the adaptive policy's copies.  [default: the engine's]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    trace: Path | None,
    shape: str | None,
    routing: str,
    num_tokens: int,
    dtype: str,
    seed: int,
    slots: tuple[int, ...],
    vram_gb: tuple[float, ...],
    batch: int,
    profile: Path | None,
    train: float,
    gbps: tuple[float, float, float] | None,
    machine_name: str | None,
    copy_share: float | None,
    as_json: bool,
) -> None:
    """Play placement policies on the routes of TRACE, which fiddler profile --trace writes.

    Tells, for each policy and size of GPU memory, how many reads of experts hit, which bytes are
    read from host memory and copied for each token, and how fast it would be: predicted as in
    fiddler plan, from what fiddler calibrate has measured here or from a machine that is like this
    one, beside what bandwidths alone allow.
    """
    from fiddler.simulating import make_study
    from fiddler.speed import PROMPT
    from offload.routing_trace import load_trace

    if trace is not None and shape is not None:
        raise ConfigError(
            f"both a TRACE, {trace}, and --shape {shape} were given, but a simulation is of one",
            hint="leave one of them out",
        )
    if trace is None and shape is None:
        raise ConfigError(
            "a simulation needs either a TRACE or --shape NAME",
            hint="for example: fiddler simulate --shape qwen3-30b-a3b --routing drift:500",
        )
    _check_given(ctx, is_shape=shape is not None)
    recorded = load_trace(trace) if trace is not None else None
    if recorded is not None:
        routes = _recorded(recorded)
    else:
        routes = _drawn(cast(str, shape), routing, dtype, num_tokens, batch, seed)
    known = _load_profile(profile, routes, recorded) if profile is not None else None
    peaks, used, hardware = _speeds(gbps, machine_name)
    study = make_study(
        routes,
        profile=known,
        train=train,
        batch=batch,
        peaks=peaks,
        rates=None if used is None else used.rates,
    )
    if copy_share is not None:
        study = dataclasses.replace(study, copy_share=copy_share)
    budgets = _budgets(routes, slots, vram_gb, hardware)
    with progress_bars() as bars:
        found = {label: study.verdicts(count, bars) for label, count in budgets.items()}
    if as_json:
        rows = [dataclasses.asdict(verdict) for verdicts in found.values() for verdict in verdicts]
        machine = None if used is None else used.name or "this machine"
        record = {"model": routes.name, "steps": len(study.steps_SMC), "machine": machine}
        click.echo(json.dumps({**record, "num_tokens": PROMPT, "rows": rows}))
    else:
        steps = f"{len(study.steps_SMC):,} steps of {counted(batch, 'token')}"
        print_verdicts(found, f"{routes.name}: {steps} played", peaks)
        print_prediction(used, is_known=routes.demand is not None)


def _recorded(trace: "RoutingTrace") -> "Routes":
    from fiddler.simulating import Routes

    return Routes(
        name=trace.model,
        footprint=trace.footprint,
        experts_TMK=trace.experts_TMK,
        num_tokens=len(trace.experts_TMK),
        demand=trace.demand,
    )


def _drawn(
    shape: str, routing: str, dtype: str, num_tokens: int, batch: int, seed: int
) -> "Routes":
    from fiddler.simulating import drawn_routes
    from offload.routing_law import parse_law

    law = parse_law(routing)
    if law is None:
        raise ConfigError(
            "a shape has no router whose choices could be played",
            hint="record a model's with: fiddler profile MODEL --text FILE --trace trace.npz",
        )
    return drawn_routes(shape, law, dtype=dtype, num_tokens=num_tokens, batch=batch, seed=seed)


def _check_given(ctx: click.Context, *, is_shape: bool) -> None:
    """Options of one kind of routes, or of one way to place, would be ignored with the other."""

    def is_given(name: str) -> bool:
        return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT

    flags = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    for name in OF_SHAPES:
        if not is_shape and is_given(name):
            raise click.UsageError(f"a trace brings its own routes: {flags[name]} needs --shape")
    for one, other in (("profile", "train"), ("gbps", "machine_name")):
        if is_given(one) and is_given(other):
            raise click.UsageError(f"give either {flags[one]} or {flags[other]}, not both")


def _load_profile(path: Path, routes: "Routes", trace: "RoutingTrace | None") -> "Profile":
    from offload.popularity import load_profile

    sizes = routes.footprint
    profile = load_profile(
        path, model=routes.name, num_layers=sizes.num_layers, num_experts=sizes.num_experts
    )
    if trace is not None and profile.corpus_sha256 == trace.corpus_sha256:
        note("the profile is of the trace's own text: other texts will hit less")
    return profile


def _speeds(
    gbps: tuple[float, float, float] | None, machine_name: str | None
) -> "tuple[Peaks, RatesHere | None, Hardware | None]":
    """What limits, by which rates is predicted, if at all, and whose GPU has how much memory."""
    from offload.limits import Peaks

    if gbps is None:
        used, hardware = _rates(machine_name)
        return used.rates.peaks, used, hardware
    host, link, gpu = gbps
    peaks = Peaks(
        cpu_read_gbps=host, joint_gbps=host, pcie_gbps=link, gpu_read_gbps=gpu, gemm_tflops=0.0
    )
    return peaks, None, None


def _rates(machine_name: str | None) -> "tuple[RatesHere, Hardware]":
    """Those of the named machine, or of this one or one like it, with a GPU in any case.

    A GPU that is here is the one whose memory counts, whatever the rates.
    """
    from fiddler.speed import gpu_rates_for, rates_of
    from offload.hardware import probe
    from offload.reference_machines import find_machine, reference_for

    if machine_name is None:
        renew_calibration(only_with_gpu=True)
        here = probe("auto")
        return gpu_rates_for(here), here if here.has_gpu else reference_for(here).hardware
    machine = find_machine(machine_name)
    if not machine.rates.has_gpu:
        raise ConfigError(
            f"{machine.name} has no GPU on which experts could be placed",
            hint="name another --hardware",
        )
    return rates_of(machine), machine.hardware


def _budgets(
    routes: "Routes",
    slots: tuple[int, ...],
    vram_gb: tuple[float, ...],
    hardware: "Hardware | None",
) -> dict[str, int]:
    """Slots to play with, by what they are called."""
    from fiddler.simulating import slots_within

    total = routes.footprint.total_experts
    if too_many := [count for count in slots if count > total]:
        raise ConfigError(f"--slots {too_many[0]} is more than the model's {total:,} experts")
    counts = [(count, "") for count in slots]
    counts += [
        (slots_within(routes.footprint, gib, hardware), f" ({gib:g} GiB)") for gib in vram_gb
    ]
    counts = counts or [(round(total * share), "") for share in SHARES]
    return {f"{count:,} of {total:,} experts on the GPU{label}": count for count, label in counts}

"""``fiddler plan``: what would run where, from ``config.json`` alone."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fiddler.cli.calibrated import renew_calibration
from fiddler.cli.console import output_console
from fiddler.cli.options import ENGINE_OPTIONS, check_shape_options, is_given, model_argument
from fiddler.cli.page_file import check_page, html_option, write_page
from fiddler.cli.plan_table import (
    PlanFacts,
    choice_lines,
    more_notes,
    price_lines,
    print_plan,
    rates_lines,
    speed_lines,
)
from fiddler.config import EngineConfig
from fiddler.errors import ConfigError, FiddlerError

if TYPE_CHECKING:
    from fiddler.hub import ModelMetadata
    from fiddler.speed import RatesHere
    from offload.hardware import Hardware

PLAN_FIELDS = {
    "vram_gb",
    "ram_gb",
    "dtype",
    "kv_cache_dtype",
    "cpu_activations",
    "device",
    "max_model_len",
    "objective",
    "profile",
    "revision",
    "token",
    "offline",
}


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add those engine options that a plan depends on, under the names of ``EngineConfig``."""
    for option in reversed(ENGINE_OPTIONS):
        if option.field in PLAN_FIELDS:
            command = option.decorate(command)
    return command


@click.command()
@model_argument(is_needed=False)
@click.option("--shape", metavar="NAME", help="A named shape instead of a model.")
@plan_options
@click.option(
    "--batch", "max_num_seqs", type=click.INT, metavar="N", help="Plan for N requests at once."
)
@click.option(
    "--hardware",
    "machine_name",
    metavar="FILE|NAME",
    help="Plan for another machine: a file of fiddler calibrate --output, h200-16core, or "
    "rtx4090-ddr5.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@html_option("Write the plan as one page.")
def command(
    model: str | None,
    shape: str | None,
    machine_name: str | None,
    as_json: bool,
    html: Path | None,
    **options: Any,
) -> None:
    """Show what would run where and how fast, without loading the model.

    MODEL is 'builtin', a folder, or ORG/NAME[@REVISION] on the hub, of which only the small files
    are downloaded. Speeds are predicted, and sizes of steps chosen by --objective, from what
    fiddler calibrate has measured here, or from a machine that is like this one; the plan says from
    which. The last table proposes settings that would be faster, the cheapest first.
    """
    _check_batch(options["max_num_seqs"])
    given = {name: value for name, value in options.items() if is_given(value)}
    check_shape_options(shape, given)
    check_page(html)
    facts = _facts(model, shape, machine_name, given)
    if html is not None:
        _write_page(facts, html)
    if as_json:
        click.echo(json.dumps(_record(facts)))
    else:
        print_plan(facts, output_console())


def _check_batch(batch: int | None) -> None:
    if batch is not None and batch < 1:
        raise ConfigError(
            f"a batch of {batch} requests cannot be planned for", hint="use --batch 1 or more"
        )


def _facts(
    model: str | None, shape: str | None, machine_name: str | None, options: dict[str, Any]
) -> PlanFacts:
    from fiddler.advice import Case, make, price_of_context
    from fiddler.faster import ways_to_go_faster, ways_to_have_room
    from fiddler.models.registry import load_config
    from fiddler.models.shapes import load_shape

    settings = EngineConfig(model=_one_of(model, shape), **options)
    found = None if shape else _fetch_metadata(settings)
    folder = found.folder if found else None
    hardware, used = _machine(machine_name, settings.device)
    name = folder.name if folder else settings.model
    made = make(
        Case(
            settings=settings,
            model=load_config(folder.path) if folder else load_shape(settings.model),
            hardware=hardware,
            name=name,
            folder=folder.path if folder else None,
            used=used,
        )
    )
    return PlanFacts(
        name=name,
        revision=folder.revision if folder else None,
        missing_bytes=found.missing_bytes if found else 0,
        config=made.case.model,
        dtypes=made.question.dtypes,
        hardware=hardware,
        plan=made.plan,
        batch=settings.max_num_seqs,
        speeds=made.speeds,
        pulled_share=made.pulled_share,
        price=price_of_context(made),
        faster=ways_to_go_faster(made),
        roomier=ways_to_have_room(made),
    )


def _machine(name: str | None, device: str) -> "tuple[Hardware, RatesHere]":
    """What to plan for, and the rates to predict with."""
    from fiddler.speed import rates_for, rates_of
    from offload.hardware import probe
    from offload.reference_machines import find_machine

    if name is None:
        renew_calibration()
        hardware = probe(device)
        return hardware, rates_for(hardware)
    machine = find_machine(name)
    hardware = machine.hardware
    if device == "cuda" and not hardware.has_gpu:
        raise ConfigError(
            f"CUDA was asked for, but {machine.name} has no GPU", hint="leave out --device"
        )
    if device == "cpu":
        hardware = hardware.without_gpu()
    return hardware, rates_of(machine)


def _write_page(facts: PlanFacts, path: Path) -> None:
    from fiddler.report.pages import plan_page
    from fiddler.report.plan_sections import advice_sections

    config = facts.config
    layers = [layer for layer in range(config.num_layers) if config.is_moe_layer(layer)]
    speeds = facts.speeds
    whose = [] if speeds is None else [line.strip("- ") for line in rates_lines(speeds.rates)]
    text = plan_page(
        *(facts.name, facts.plan, facts.hardware, layers, config.num_experts),
        more_facts=[*choice_lines(facts), *speed_lines(facts), *price_lines(facts), *whose],
        more=advice_sections(speeds, facts.faster) if speeds is not None else (),
        more_notes=more_notes(facts),
    )
    write_page(path, text)


def _one_of(model: str | None, shape: str | None) -> str:
    if model and not shape:
        return model
    if shape and not model:
        return shape
    if model and shape:
        raise ConfigError(
            f"both a model, {model}, and --shape {shape} were given, but a plan is of one",
            hint="leave one of them out",
        )
    raise ConfigError(
        "a plan needs either a model or --shape NAME",
        hint="for example: fiddler plan --shape mixtral-8x7b",
    )


def _fetch_metadata(settings: EngineConfig) -> "ModelMetadata":
    from fiddler.hub import fetch_metadata
    from fiddler.models.shapes import SHAPES

    try:
        return fetch_metadata(
            settings.model,
            revision=settings.revision,
            token=settings.token,
            offline=settings.offline,
        )
    except FiddlerError as error:
        if settings.model in SHAPES:
            error.hint = f"a shape of that name is known: fiddler plan --shape {settings.model}"
        raise


def _record(facts: PlanFacts) -> dict[str, Any]:
    """The facts as JSON types."""
    return {
        "model": facts.name,
        "revision": facts.revision,
        "missing_bytes": facts.missing_bytes,
        "num_layers": facts.config.num_layers,
        "num_experts": facts.config.num_experts,
        "top_k": facts.config.top_k,
        "dtype": facts.dtypes.compute,
        "expert_dtype": facts.dtypes.expert,
        "kv_dtype": facts.dtypes.kv,
        "hardware": dataclasses.asdict(facts.hardware),
        "plan": facts.plan.to_dict(),
        "speeds": facts.speeds.to_dict() if facts.speeds is not None else None,
        "pulled_share_of_cold_experts": facts.pulled_share,
        "context_price": facts.price and dataclasses.asdict(facts.price),
        "faster": [way.to_dict() for way in facts.faster],
        "room_for_the_batch": list(facts.roomier),
    }

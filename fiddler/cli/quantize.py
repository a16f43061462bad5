"""``fiddler quantize``: make a checkpoint whose experts take a quarter or half of the memory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fiddler.cli.console import note
from fiddler.cli.option_types import Whole
from fiddler.cli.options import model_argument, some_engine_options
from fiddler.progress import progress_bars

if TYPE_CHECKING:
    from cpu_kernels.weight_kind import WeightKind
    from fiddler.quantize.expert import Method
    from fiddler.quantize.run import QuantizedModel

EXAMPLES = 5  # experts named of those that saw too little


@click.command()
@model_argument()
@click.option(
    "--scheme",
    default="w4g128z",
    show_default=True,
    metavar="bf12|w8g128|w4g128|w4g64|w4g32|...",
    help="bf12: bfloat16 in 12 bits, without loss. Else bits and group; z: with zero points;"
    " -bf16: bfloat16 scales.",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "gptq"]),
    help="Round each weight, or fit to a text.  [default: gptq with --calibration]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A UTF-8 text like those that the model will read.",
)
@click.option(
    "--outliers",
    type=Whole(min=0),
    default=0,
    metavar="N",
    help="Keep the columns of the N largest inputs of each matrix in 8 bits.",
)
@click.option(
    "--sensitivity",
    type=float,
    metavar="SHARE",
    help="Give layers that lose most more bits, up to this share of bfloat16's size.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the new model goes.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@some_engine_options("revision", "token", "offline")
def command(
    model: str,
    scheme: str,
    method: "Method | None",
    calibration: Path | None,
    outliers: int,
    sensitivity: float | None,
    output: Path,
    resume: bool,
    engine: dict[str, Any],
) -> None:
    """Write MODEL to DIR with its routed experts in 4 or 8 bits, the rest in bfloat16.

    An earlier model in DIR is replaced when the new one is whole. Needs no GPU, and memory for one
    layer; with many cores more, up to half of what is free.
    """
    from fiddler.hub import resolve_model
    from fiddler.quantize.run import QuantizeJob, quantize

    with progress_bars() as bar:
        job = QuantizeJob(
            source=resolve_model(model, progress=bar, **engine).path,
            output=output,
            kind=_kind(scheme),
            method=method or ("rtn" if calibration is None else "gptq"),
            calibration=calibration,
            outliers=outliers,
            sensitivity=sensitivity,
            resume=resume,
        )
        try:
            made = quantize(job, bar)
        except KeyboardInterrupt:
            note("interrupted; the same command with --resume goes on")
            raise
    _print(made)


def _kind(scheme: str) -> "WeightKind":
    from cpu_kernels.weight_kind import PACKED_KINDS
    from fiddler.errors import ConfigError, nearest

    kinds = {kind.name: kind for kind in PACKED_KINDS}
    if scheme not in kinds:
        raise ConfigError(
            f"there is no scheme {scheme!r}{nearest(scheme, kinds)}",
            hint=f"schemes: {', '.join(kinds)}",
        )
    return kinds[scheme]


def _print(made: "QuantizedModel") -> None:
    from fiddler.hub.cache import gigabytes

    share = made.expert_bytes / made.bf16_expert_bytes
    note(
        f"{made.num_experts:,} experts in {gigabytes(made.expert_bytes)}, {share:.1%} of bfloat16;"
        f" {gigabytes(made.nbytes)} in all"
    )
    if len(made.layers_of) > 1:
        parts = (f"{kind}: {', '.join(map(str, at))}" for kind, at in made.layers_of.items())
        note(f"layers of {'; '.join(sorted(parts))}")
    if made.unfitted:
        shown = ", ".join(f"{layer}.{expert}" for layer, expert in made.unfitted[:EXAMPLES])
        more = ", ..." if len(made.unfitted) > EXAMPLES else ""
        note(
            f"{len(made.unfitted):,} of them saw fewer than {made.least_tokens:,} tokens of the"
            f" text and are rounded without it (layer.expert {shown}{more})"
        )
    click.echo(made.folder)

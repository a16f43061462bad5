"""Options that several commands share: each is written once, with its help text."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import click

from fiddler.cli.option_types import Dtype, Gib, Number, Tokens, Whole
from fiddler.config import (
    BUILTIN,
    CPU_ACTIVATIONS,
    DEVICES,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    PLACEMENT_POLICIES,
)
from fiddler.errors import ConfigError

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

GIB = Gib(min=0)
COUNT = Whole(min=1)


@dataclass(frozen=True, slots=True)
class Shared:
    """One option and the field of ``EngineConfig`` or ``SamplingParams`` that it sets."""

    flag: str
    field: str
    type: click.ParamType[Any] | None  # None: a switch
    metavar: str | None
    help: str
    multiple: bool = False
    default: str = ""  # as help shows it; whoever gets no value applies it

    def decorate(self, command: Callable[..., Any]) -> Callable[..., Any]:
        """Add the option to ``command``; not given, its value is None, False or ()."""
        shown = f"{self.help}  [default: {self.default}]" if self.default else self.help
        if self.type is None:
            return click.option(self.flag, self.field, is_flag=True, help=shown)(command)
        return click.option(
            self.flag,
            self.field,
            type=self.type,
            metavar=self.metavar,
            multiple=self.multiple,
            help=shown,
        )(command)


ENGINE_OPTIONS = (
    Shared("--vram-gb", "vram_gb", GIB, "GIB", "GPU memory to use in all, CUDA context included."),
    Shared("--ram-gb", "ram_gb", GIB, "GIB", "Host memory to use; experts beyond it stay on disk."),
    Shared(
        "--dtype",
        "dtype",
        Dtype(),
        "TYPE",
        "Weights in memory: float32, bfloat16, or experts in bf12 (bfloat16 without loss), w4g128, "
        "w8g128 and the like.",
    ),
    Shared(
        "--kv-dtype",
        "kv_cache_dtype",
        click.Choice(KV_CACHE_DTYPES),
        None,
        "Type of the KV cache; fp8 and int8 hold twice the tokens of bfloat16, int4 four times.",
    ),
    Shared(
        "--cpu-activations",
        "cpu_activations",
        click.Choice(CPU_ACTIVATIONS),
        None,
        "What the CPU rounds activations to before rounded experts; auto: int8 beside bfloat16.",
    ),
    Shared("--device", "device", click.Choice(DEVICES), None, "Where the dense layers run."),
    Shared(
        "--context",
        "max_model_len",
        Tokens(min=1),
        "TOKENS",
        "Longest prompt plus answer; unasked 2,048 to 32,768, as there is room.",
    ),
    Shared(
        "--objective",
        "objective",
        click.STRING,
        "WHAT",
        "Least time of: decode, prefill, or mix:P:N, which reads P tokens and writes N.",
    ),
    Shared("--cpu-threads", "cpu_threads", COUNT, "N", "Threads that compute experts."),
    Shared(
        "--tbt-target-ms",
        "tbt_target_ms",
        Number(min=0, min_open=True),
        "MS",
        "Read prompts in smaller pieces while others are answered.",
    ),
    Shared("--enforce-eager", "enforce_eager", None, None, "Decode without CUDA graphs."),
    Shared("--profile", "profile", click.Path(), "FILE", "Routing profile for the placement."),
    Shared(
        "--placement",
        "placement_policy",
        click.Choice(PLACEMENT_POLICIES),
        None,
        "'adaptive': experts move to the GPU and back with use; 'auto': so without a profile.",
    ),
    Shared("--revision", "revision", click.STRING, "REV", "Branch, tag or commit on the hub."),
    Shared("--token", "token", click.STRING, "TOKEN", "Access token of the hub; else HF_TOKEN."),
    Shared("--offline", "offline", None, None, "Use only what is already downloaded."),
    Shared(
        "--seed", "seed", click.INT, "N", "Seed of sampling, and of dummy weights.", default="0"
    ),
    Shared(
        "--load-format",
        "load_format",
        click.Choice(LOAD_FORMATS),
        None,
        "'dummy': seeded random weights instead of the checkpoint's.",
    ),
)

THE_MODELS = "the model's generation_config.json, or {}"

SAMPLING_OPTIONS = (
    Shared("--max-tokens", "max_tokens", COUNT, "N", "Longest answer.", default="512"),
    Shared("--min-tokens", "min_tokens", Whole(min=0), "N", "Shortest answer."),
    Shared(
        "--temperature",
        "temperature",
        click.FLOAT,
        "X",
        "0 is greedy.",
        default=THE_MODELS.format(1),
    ),
    Shared(
        "--top-k",
        "top_k",
        click.INT,
        "K",
        "Draw from the K likeliest tokens; 0: all.",
        default=THE_MODELS.format(0),
    ),
    Shared(
        "--top-p",
        "top_p",
        click.FLOAT,
        "P",
        "Draw from the likeliest tokens of total P.",
        default=THE_MODELS.format(1),
    ),
    Shared("--min-p", "min_p", click.FLOAT, "P", "Drop tokens below P times the likeliest."),
    Shared(
        "--repetition-penalty",
        "repetition_penalty",
        click.FLOAT,
        "X",
        "1 is none.",
        default=THE_MODELS.format(1),
    ),
    Shared("--presence-penalty", "presence_penalty", click.FLOAT, "X", "0 is none."),
    Shared("--frequency-penalty", "frequency_penalty", click.FLOAT, "X", "0 is none."),
    Shared("--stop", "stop", click.STRING, "TEXT", "End before TEXT; may be repeated.", True),
    Shared("--ignore-eos", "ignore_eos", None, None, "Go on after the end-of-text token."),
)

model_option = click.option(
    "-m",
    "--model",
    default=BUILTIN,
    show_default=True,
    help="'builtin', a folder, or ORG/NAME[@REVISION] on the hub.",
)


def model_argument(*, is_needed: bool = True, default: str | None = None) -> Decorator:
    """MODEL or ``-m MODEL``, so that whoever knows one command can use the others.

    ``command`` gets ``model``: what was given, ``default``, or None if it is not needed.
    """
    shown = "" if default is None else f"  [default: {default}]"

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_model(*, model: str | None, same_model: str | None, **values: Any) -> Any:
            if model is not None and same_model is not None:
                raise click.UsageError("give either MODEL or -m MODEL, not both")
            found = same_model if model is None else model
            if found is None and is_needed and default is None:
                raise click.UsageError("Missing argument 'MODEL'.")
            return command(model=default if found is None else found, **values)

        help = f"The same as MODEL.{shown}"
        option = click.option("-m", "--model", "same_model", metavar="MODEL", help=help)
        metavar = "MODEL" if is_needed and default is None else "[MODEL]"
        return click.argument("model", required=False, metavar=metavar)(option(with_model))

    return decorate


def reasoning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--system``, ``--think`` and ``--hide-thinking``."""
    think = click.Choice(["auto", "on", "off"])
    for option in (
        click.option("--hide-thinking", is_flag=True, help="Do not show the model's reasoning."),
        click.option(
            "--think",
            type=think,
            default="auto",
            show_default=True,
            help="Ask the model's template for reasoning or against it.",
        ),
        click.option("-s", "--system", metavar="TEXT", help="System prompt."),
    ):
        command = option(command)
    return command


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the engine's options; ``command`` gets those given as ``engine``, a dict for ``LLM``."""
    return _gathered("engine", ENGINE_OPTIONS)(command)


def some_engine_options(*fields: str) -> Decorator:
    """As :func:`engine_options`, with those options alone that set ``fields``."""
    return _gathered("engine", tuple(o for o in ENGINE_OPTIONS if o.field in fields))


def sampling_options(*, longest: str = "512") -> Decorator:
    """Add the sampling options; the command gets those given as ``sampling``, a dict.

    ``longest`` says how long an answer may be unasked.
    """
    first, *rest = SAMPLING_OPTIONS
    return _gathered("sampling", (replace(first, default=longest), *rest))


def _gathered(argument: str, options: tuple[Shared, ...]) -> Decorator:
    """Decorator: options that were given arrive as one dict named ``argument``."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def gathered(**values: Any) -> Any:
            given = {option.field: values.pop(option.field) for option in options}
            given = {name: value for name, value in given.items() if is_given(value)}
            return command(**{argument: given}, **values)

        decorated: Callable[..., Any] = gathered
        for option in reversed(options):
            decorated = option.decorate(decorated)
        return decorated

    return decorate


def check_shape_options(shape: str | None, options: dict[str, Any]) -> None:
    """ConfigError for options of the hub beside a shape, which is on none."""
    wrong = [flag for flag in ("revision", "token") if shape and options.get(flag)]
    if wrong:
        raise ConfigError(
            f"--{wrong[0]} is for models of the hub, and --shape {shape} is none",
            hint="leave it out, or name a model instead of the shape",
        )


def is_given(value: Any) -> bool:
    """Whether an option's value is the user's; 0 is one."""
    return value is not None and value is not False and value != ()

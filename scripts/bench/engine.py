"""Load, prefill and decode speed of a model or a named shape, with what it took of the GPU.

    python -m scripts.bench.engine                                   the built-in model
    python -m scripts.bench.engine --shape qwen3-30b-a3b --vram-gb 24

Prompts are seeded random tokens. Prefill and decode are medians over the repetitions, the first of
which is a warm-up and not counted.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import click

from fiddler import LLM, SamplingParams
from fiddler.cli.options import ENGINE_OPTIONS
from offload.units import GIB


def option(field: str):  # type: ignore[no-untyped-def]
    """The command line's own option for an engine setting."""
    return next(o for o in ENGINE_OPTIONS if o.field == field).decorate


@click.command()
@click.option("-m", "--model", default="builtin", show_default=True, help="As for `fiddler chat`.")
@click.option("--shape", help="A named shape with seeded weights instead of a model.")
@click.option("-p", "--n-prompt", default=512, show_default=True, help="Tokens of the prompt.")
@click.option("-n", "--n-gen", default=64, show_default=True, help="Tokens to generate.")
@click.option("-r", "--repetitions", default=3, show_default=True, help="Runs that count.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write JSON here.")
@option("vram_gb")
@option("dtype")
@option("cpu_threads")
def main(
    model: str,
    shape: str | None,
    n_prompt: int,
    n_gen: int,
    repetitions: int,
    output: Path | None,
    **engine: object,
) -> None:
    """Measure one configuration and print one row of figures a line."""
    options = {name: value for name, value in engine.items() if value is not None}
    if shape is not None:
        model, options["load_format"] = shape, "dummy"
    start = time.perf_counter()
    with LLM(model, prefix_caching=False, max_model_len=n_prompt + n_gen, **options) as llm:
        load_s = time.perf_counter() - start
        report = {
            "model": model,
            "load_s": round(load_s, 2),
            **measure(llm, n_prompt, n_gen, repetitions),
        }
        report |= facts(llm)
    for name, value in report.items():
        print(f"{name:22} {value}")
    if output is not None:
        output.write_text(json.dumps(report, indent=1))


def measure(llm: LLM, n_prompt: int, n_gen: int, repetitions: int) -> dict[str, object]:
    """Run the same request ``repetitions + 1`` times."""
    params = SamplingParams(temperature=0, max_tokens=n_gen, ignore_eos=True)
    vocab = llm.model_config.vocab_size
    prompts = [
        [(i * 7919 + r * 104_729) % vocab for i in range(n_prompt)] for r in range(repetitions + 1)
    ]
    runs = [llm.generate(prompt, params).stats for prompt in prompts][1:]
    return {
        f"pp{n_prompt}_tok_s": median(s.prefill_tokens_per_s for s in runs),
        f"tg{n_gen}_tok_s": median(s.decode_tokens_per_s for s in runs),
        "hit_rate": round(statistics.mean(s.gpu_hit_rate for s in runs), 4),
        "peak_vram_gib": round(runs[-1].peak_vram_bytes / GIB, 2),
    }


def facts(llm: LLM) -> dict[str, object]:
    """What was planned, and what the driver says is in use now."""
    return {
        "gpu_experts": llm.plan.placement.num_resident,
        "experts": llm.model_config.num_experts * llm.model_config.num_layers,
        "vram_budget_gib": round(llm.plan.vram_budget_bytes / GIB, 2),
        "driver_used_gib": driver_used_gib(),
        "gpu": llm.hardware.gpu_name,
        "cpu": llm.hardware.cpu_name,
    }


def driver_used_gib() -> float:
    """Memory in use on the whole device, as the driver counts it; 0 without a GPU."""
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / GIB, 2)


def median(values: object) -> float:
    """To three digits."""
    return round(statistics.median(values), 2)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()

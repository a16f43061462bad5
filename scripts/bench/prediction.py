"""Predicted and measured speeds of shapes that do not fit the GPU.

    python -m scripts.bench.prediction [--seconds 450] [--repetitions 5] [--shares 0.2,0.5,0.8]

Two shapes with fewer layers and seeded weights, in bf16 and w4g128, with room on the GPU for some
shares of their experts: 48 tokens written and a prompt of 1,024 read, with uniform routing. Rates
are those of ``fiddler calibrate``, which runs first where it has not. Prints each error, their
median and the worst, and writes build/bench-prediction.json after every model: the rates, and of
each row what was asked (``demand``), every predicted term, and what was seen of the CPU's jobs and
of PCIe, so that constants can be fitted to it elsewhere:
``--again FILE`` predicts its rows anew, on any machine, with the constants as they are now.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Driver, load
from fiddler.benchmark.predicted import predict_case, predict_demands
from fiddler.benchmark.routing import DrawnRouting
from fiddler.benchmark.subject import Subject
from fiddler.benchmark.watched import how_far_off, watch
from fiddler.cli.calibrate import measure
from fiddler.config import EngineConfig
from fiddler.loading import LoadedModel
from fiddler.models.footprint import expert_bytes
from fiddler.models.registry import parse_config
from fiddler.models.shapes import SHAPES
from fiddler.speed import demand_of, drawn_chances, own_rates
from offload.chances import LayerChances
from offload.demand import Demand
from offload.hardware import probe
from offload.machine_rates import MachineRates, from_json, to_json
from offload.routing_law import Law
from offload.units import GIB

OUTPUT = Path("build/bench-prediction.json")
LAYERS = {"mixtral-8x7b": 8, "qwen3-30b-a3b": 16}  # 21 and 18 GiB of experts in bf16
KINDS = {"bf16": "bfloat16", "w4g128": "w4g128"}
FIXED_GIB = 5.0  # for all but the experts
CASES = (
    Case(n_prompt=0, n_gen=48, n_depth=0, n_parallel=1),
    Case(n_prompt=1024, n_gen=0, n_depth=0, n_parallel=1),
)
PROMPT_RUNS = 3  # times as many
LAW = Law()


@dataclass(frozen=True, slots=True)
class Model:
    """A shape with ``layers``, its experts of a kind, and the share of them that has room."""

    shape: str
    layers: int
    kind: str
    share: float

    @property
    def fields(self) -> dict[str, Any]:
        """A config.json."""
        return {"dtype": "bfloat16", **SHAPES[self.shape], "num_hidden_layers": self.layers}

    @property
    def vram_gb(self) -> float:
        """GiB to use in all."""
        config = parse_config(self.fields)
        each = expert_bytes(config, KINDS[self.kind], layer=0)
        return FIXED_GIB + self.share * config.num_layers * config.num_experts * each / GIB

    def __str__(self) -> str:
        return f"{self.shape}, {self.layers} layers, {self.kind}, {self.share:.0%}"


@contextmanager
def loaded_model(model: Model, device: str) -> Iterator[LoadedModel]:
    """The model with seeded weights, gone at the end."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.fields))
        settings = EngineConfig(
            model=folder,
            load_format="dummy",
            prefix_caching=False,
            max_model_len=max(case.length for case in CASES),
            max_num_seqs=1,
            vram_gb=model.vram_gb,
            dtype=model.kind if model.kind != "bf16" else "auto",
            device=device,
        )
        loaded = load(settings, list(CASES), None)
        with loaded.resources:
            yield loaded


def rows_of(
    model: Model, rates: MachineRates, repetitions: int, device: str
) -> list[dict[str, Any]]:
    """Both tests of one model."""
    rows = []
    with loaded_model(model, device) as loaded:
        config, subject = loaded.files.config, Subject.of(loaded)
        driver = Driver(loaded, routing=DrawnRouting(LAW, config, seed=0), seed=0)
        for case in CASES:
            # prompts are short: one moment in which others use the host must not be all of them
            measured = driver.measure(case, repetitions * (PROMPT_RUNS if case.n_prompt else 1))
            predicted = predict_case(subject, measured, rates, LAW)
            seen = watch(loaded, driver, case)
            hit_rate = (measured.prompt + measured.decode).hit_rate
            demand = demand_of(
                config,
                subject.dtypes,
                subject.plan,
                layers=drawn_chances(config, subject.plan, LAW, hit_rate),
            )
            rows.append(
                {
                    "model": str(model),
                    "test": case.name,
                    "case": asdict(case),
                    "vram_gb": model.vram_gb,
                    "samples_ms": [sample / 1e6 for sample in measured.samples_ns],
                    "measured_ms": statistics.median(measured.samples_ns) / 1e6,
                    "predicted_ms": predicted.seconds * 1e3,
                    "error": 1 / how_far_off(measured, predicted) - 1,
                    "hit_rate": hit_rate,
                    "terms": predicted.to_dict(),
                    "watched": {kind: part.to_dict() for kind, part in seen.items()},
                    "demand": asdict(demand),
                }
            )
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row as text, with the parts that matter most."""
    (kind,) = row["watched"]
    seen = row["watched"][kind]
    terms = sorted(row["terms"][kind], key=lambda term: -term["busy_s"])[:3]
    parts = ", ".join(f"{term['name']} {term['busy_s'] * 1e3:.3g}" for term in terms)
    launch_s = seen.get("launch_s", 0.0)  # of prompts, since 2026-11-23
    then = f"; Python then took {launch_s * 1e6:.0f} us for a launch" if launch_s else ""
    return (
        f"{row['model']:40} {row['test']:7} {row['measured_ms']:9.1f} ms, predicted "
        f"{row['predicted_ms']:9.1f} ({row['error']:+.0%}); a step {seen['step_s'] * 1e3:.3g} ms, "
        f"CPU jobs {seen['cpu_s'] * 1e3:.3g}; foreseen {parts}{then}"
    )


def again(path: Path) -> list[dict[str, Any]]:
    """The rows of a file as they are predicted now."""
    record = json.loads(path.read_text())
    rates = from_json(record["rates"])
    return [predicted_again(row, rates) for row in record["rows"]]


def predicted_again(row: dict[str, Any], rates: MachineRates) -> dict[str, Any]:
    """The same row with another prediction."""
    layers = tuple(
        LayerChances(tuple(layer["hot"]), tuple(layer["cold"])) for layer in row["demand"]["layers"]
    )
    demand = Demand(**{**row["demand"], "layers": layers})
    predicted = predict_demands(Case(**row["case"]), rates, demand, demand)
    error = predicted.seconds * 1e3 / row["measured_ms"] - 1
    return {
        **row,
        "predicted_ms": predicted.seconds * 1e3,
        "error": error,
        "terms": predicted.to_dict(),
    }


def known_rates() -> MachineRates:
    """As ``fiddler calibrate`` found them, or finds them now."""
    rates, why_not = own_rates(probe())
    if rates is not None:
        return rates
    print(f"{why_not}: calibrating", file=sys.stderr)
    return measure().rates


def summary(rows: list[dict[str, Any]]) -> str:
    """Of all rows."""
    errors = sorted(abs(row["error"]) for row in rows)
    return f"median error {statistics.median(errors):.0%}, worst {errors[-1]:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=450, help="then no further model")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--shares", default="0.2,0.5,0.8", help="of the experts, with commas")
    parser.add_argument("--shapes", default=",".join(LAYERS), help="with commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas")
    parser.add_argument("--again", type=Path, metavar="FILE", help="predict its rows anew")
    options = parser.parse_args()
    if options.again is not None:
        rows = again(options.again)
        print("\n".join(map(line_of, rows)))
        print(summary(rows))
        return
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: this measures one")
    started = time.perf_counter()
    rates = known_rates()
    print({**to_json(rates), "times": len(rates.times)})
    models = [
        Model(shape, LAYERS[shape], kind, float(share))
        for kind in options.kinds.split(",")
        for shape in options.shapes.split(",")
        for share in options.shares.split(",")
    ]
    rows = []
    for model in models:
        if time.perf_counter() - started > options.seconds:
            print(f"no time left for {model}")
            continue
        rows += rows_of(model, rates, options.repetitions, "auto")
        OUTPUT.parent.mkdir(exist_ok=True)
        OUTPUT.write_text(json.dumps({"rates": to_json(rates), "rows": rows}, indent=1) + "\n")
    print(summary(rows))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

"""The whole engine on named shapes within 24 GiB: one table and build/bench-engine.json.

    python -m scripts.bench.engine [--parts qwen,mixtral,skew,hand_over] [--repetitions 5]

Weights are seeded, one request at a time, short context. Speeds stand beside the limit that this
run's bandwidths set, and a target in the same unit.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fiddler.benchmark.build import build_commit
from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Driver, Measurement, load
from fiddler.benchmark.record import Setting, record_of, tokens_per_s
from fiddler.benchmark.routing import DrawnRouting
from fiddler.benchmark.subject import Subject
from fiddler.config import EngineConfig
from fiddler.loading import LoadedModel
from fiddler.models.config import ModelConfig
from fiddler.models.shapes import load_shape
from offload.drawn_routes import DrawnRoutes
from offload.peaks import measure_peaks
from offload.placement import Placement
from offload.popularity import Popularity, Profile, save_profile
from offload.routing_law import Law
from scripts.bench.rows import Row, at_least, at_most, table, write

OUTPUT = Path("build/bench-engine.json")
VRAM_GB = 24.0
SKEW = Law(skew=1.2)
SKEWED = 90.0  # tokens a second
NUM_PROFILED = 512  # tokens
MOST_HAND_OVER_US = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Tokens per second of one shape, and the share of the decode limit."""

    shape: str
    written: int
    decode: float
    decode_share: float
    prompt_512: float
    prompt_2048: float
    batch_4: float | None = None  # most growth of a step's time from one request to four
    routed: float | None = None  # decode, where the model's own routers choose


QWEN = Targets(
    shape="qwen3-30b-a3b",
    written=64,
    decode=60,
    decode_share=0.8,
    prompt_512=800,
    prompt_2048=3000,
    routed=90,
)
MIXTRAL = Targets(
    shape="mixtral-8x7b",
    written=32,
    decode=10,
    decode_share=0.8,
    prompt_512=450,
    prompt_2048=1400,
    # 2.73 times the distinct experts of one request, and a tenth
    batch_4=1.1 * 2.73,
)


def decode(count: int, parallel: int = 1) -> Case:
    """Write ``count`` tokens of each request."""
    return Case(n_prompt=0, n_gen=count, n_depth=0, n_parallel=parallel)


def prompt(count: int) -> Case:
    """Read one prompt."""
    return Case(n_prompt=count, n_gen=0, n_depth=0, n_parallel=1)


@contextmanager
def loaded_shape(shape: str, cases: list[Case], **options: object) -> Iterator[LoadedModel]:
    """A shape with seeded weights that has room for ``cases``."""
    settings = EngineConfig(
        model=shape,
        load_format="dummy",
        prefix_caching=False,
        max_model_len=max(case.length for case in cases),
        max_num_seqs=max(case.n_parallel for case in cases),
        **{"vram_gb": VRAM_GB, **options},  # type: ignore[arg-type]
    )
    loaded = load(settings, cases, None)
    with loaded.resources:
        yield loaded


def driver_of(loaded: LoadedModel, law: Law | None, num_experts: int | None = None) -> Driver:
    """Routes drawn by ``law`` among the first experts; None: the routers' own."""
    config = loaded.files.config
    if num_experts is not None:
        config = replace(config, num_experts=num_experts)
    routing = None if law is None else DrawnRouting(law, config, seed=0)
    return Driver(loaded, routing=routing, seed=0)


def shape_rows(targets: Targets, repetitions: int) -> list[Row]:
    """Decode and prompts of one shape; then the limits, in the memory that it has left."""
    one, four = decode(targets.written), decode(targets.written, 4)
    cases = [one, prompt(512), prompt(2048), *([four] if targets.batch_4 else [])]
    with loaded_shape(targets.shape, cases) as loaded:
        driver = driver_of(loaded, Law())
        uniform = [driver.measure(case, repetitions) for case in cases]
        if targets.routed is not None:
            routed = driver_of(loaded, None).measure(one, repetitions)
        subject = Subject.of(loaded)
    peaks = measure_peaks(
        subject.hardware, num_threads=subject.num_threads, dtype=subject.dtypes.compute
    )
    setting = Setting(subject=subject, peaks=peaks, routing="uniform", build=build_commit())
    print(
        f"{targets.shape}: CPU reads {peaks.cpu_read_gbps:.0f} GB/s, with PCIe "
        f"{peaks.joint_gbps:.0f}, PCIe {peaks.pcie_gbps:.1f}; {subject.num_threads} threads, "
        f"{subject.plan.placement.num_resident} experts on the GPU"
    )
    names = ("decode", "prompt of 512", "prompt of 2,048")
    wanted = (targets.decode, targets.prompt_512, targets.prompt_2048)
    rows = [
        speed_row(f"{targets.shape}, {name}, uniform", measured, setting, target)
        for name, measured, target in zip(names, uniform, wanted, strict=False)
    ]
    value, limit, ratio = rows[0].value, rows[0].limit, rows[0].ratio
    name = f"{targets.shape}, decode, share of its limit"
    rows.append(at_least(name, value, "tok/s", limit, ratio, targets.decode_share))
    if targets.batch_4 is not None:
        rows.append(batch_row(targets.shape, uniform[0], uniform[-1], targets.batch_4))
    if targets.routed is not None:
        missed = 1 - routed.decode.hit_rate
        name = f"{targets.shape}, decode, the routers' choices, {missed:.0%} missed"
        rows.append(speed_row(name, routed, setting, targets.routed))
    return rows


def batch_row(shape: str, one: Measurement, many: Measurement, target: float) -> Row:
    """How much longer a step of several requests takes than a step of one."""
    one_ms, many_ms = (1e3 * m.case.n_parallel / tokens_per_s(m)[0] for m in (one, many))
    name = f"{shape}, time of a step of {many.case.n_parallel} requests, in steps of one"
    return at_most(name, many_ms, "ms", one_ms, many_ms / one_ms, target)


def speed_row(name: str, measured: Measurement, setting: Setting, target: float) -> Row:
    """The median of the runs beside its limit; the target is a speed too."""
    record = record_of(measured, setting)
    value = record["median_ts"]
    return Row(
        name=name,
        value=value,
        unit="tok/s",
        limit=record["limit_ts"],
        ratio=record["ratio"],
        target=target,
        met=value >= target,
    )


def skewed_rows(repetitions: int) -> list[Row]:
    """Decode with skewed routing, without a profile and with one of other tokens."""
    shape = QWEN.shape
    plain = skewed_run(repetitions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        counts_LE = counts_of(load_shape(shape))
        save_profile(
            Profile(
                model=shape,
                revision=None,
                corpus_sha256="",
                num_tokens=NUM_PROFILED,
                popularity=Popularity(counts_LE),
                created=plain.started,
            ),
            path,
        )
        profiled = skewed_run(repetitions, profile=str(path))
    speeds = [tokens_per_s(measured)[0] for measured in (plain, profiled)]
    missed = [1 - measured.decode.hit_rate for measured in (plain, profiled)]
    name = f"{shape}, decode, zipf:{SKEW.skew}, with a profile, {missed[1]:.0%} missed"
    gained = speeds[0] * missed[0] / missed[1]  # where cold bytes are all that takes time
    return [
        Row(
            name=name,
            value=speeds[1],
            unit="tok/s",
            limit=gained,
            ratio=speeds[1] / gained,
            target=SKEWED,
            met=speeds[1] >= SKEWED,
        ),
        at_least(
            f"{name}, of {missed[0]:.0%} missed without",
            *(speeds[1], "tok/s", speeds[0], speeds[1] / speeds[0], 1.0),
        ),
    ]


def skewed_run(repetitions: int, **options: object) -> Measurement:
    """One load; nothing of it is left when this returns."""
    case = decode(QWEN.written)
    with loaded_shape(QWEN.shape, [case], **options) as loaded:
        return driver_of(loaded, SKEW).measure(case, repetitions)


def counts_of(config: ModelConfig) -> np.ndarray:
    """How often tokens of another request choose each expert."""
    routes = DrawnRoutes(
        SKEW,
        seed=0,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        top_k=config.top_k,
    )
    ids_LPK = routes.ids(10**6, 0, NUM_PROFILED).swapaxes(0, 1)
    return np.stack([np.bincount(ids.ravel(), minlength=config.num_experts) for ids in ids_LPK])


def hand_over_rows(repetitions: int) -> list[Row]:
    """A step whose experts are all resident: in a graph that rings the workers, and in one not."""
    shape, case, seconds = "olmoe-1b-7b", decode(256), []
    config = load_shape(shape)
    most = config.num_experts - 1  # of a layer that has a cold expert, which nobody draws
    for num_resident in (config.num_experts, most):
        placement = Placement.of([range(num_resident)] * config.num_layers)
        with loaded_shape(shape, [case], placement=placement) as loaded:
            measured = driver_of(loaded, Law(), num_experts=most).measure(case, repetitions)
        assert measured.decode.hit_rate == 1
        seconds.append(1 / tokens_per_s(measured)[0])
    each_us = 1e6 * (seconds[1] - seconds[0]) / config.num_layers
    return [
        at_most(
            f"{shape}, hand-over without cold experts, each of {config.num_layers} layers",
            *(each_us, "us", MOST_HAND_OVER_US, each_us / MOST_HAND_OVER_US, 1.0),
        )
    ]


PARTS = {
    "qwen": lambda repetitions: shape_rows(QWEN, repetitions),
    "mixtral": lambda repetitions: shape_rows(MIXTRAL, repetitions),
    "skew": skewed_rows,
    "hand_over": hand_over_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here: this measures one")
    rows: list[Row] = []
    for part in options.parts.split(","):
        rows += PARTS[part](options.repetitions)
        print(table(rows), flush=True)
        write(rows, OUTPUT)


if __name__ == "__main__":
    main()

"""Speeds of shapes in bf16 or bf12, beside the limits of this run's bandwidths."""

from dataclasses import dataclass

from fiddler.benchmark.build import build_commit
from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.record import Setting, record_of, tokens_per_s
from fiddler.benchmark.subject import Subject
from offload.peaks import measure_peaks
from offload.routing_law import Law
from scripts.bench.engine.shapes import decode, driver_of, loaded_shape, prompt
from scripts.bench.rows import Row, at_least, at_most


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


def shape_rows(targets: Targets, repetitions: int, dtype: str = "auto") -> list[Row]:
    """Decode and prompts of one shape; then the limits, in the memory that it has left."""
    one, four = decode(targets.written), decode(targets.written, 4)
    cases = [one, prompt(512), prompt(2048), *([four] if targets.batch_4 else [])]
    shape = targets.shape if dtype == "auto" else f"{targets.shape} {dtype}"
    with loaded_shape(targets.shape, cases, dtype=dtype) as loaded:
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
        f"{shape}: CPU reads {peaks.cpu_read_gbps:.0f} GB/s, with PCIe "
        f"{peaks.joint_gbps:.0f}, PCIe {peaks.pcie_gbps:.1f}; {subject.num_threads} threads, "
        f"{subject.plan.placement.num_resident} experts on the GPU"
    )
    names = ("decode", "prompt of 512", "prompt of 2,048")
    wanted = (targets.decode, targets.prompt_512, targets.prompt_2048)
    rows = [
        speed_row(f"{shape}, {name}, uniform", measured, setting, target)
        for name, measured, target in zip(names, uniform, wanted, strict=False)
    ]
    value, limit, ratio = rows[0].value, rows[0].limit, rows[0].ratio
    name = f"{shape}, decode, share of its limit"
    rows.append(at_least(name, value, "tok/s", limit, ratio, targets.decode_share))
    if targets.batch_4 is not None:
        rows.append(batch_row(shape, uniform[0], uniform[-1], targets.batch_4))
    if targets.routed is not None:
        missed = 1 - routed.decode.hit_rate
        name = f"{shape}, decode, the routers' choices, {missed:.0%} missed"
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

"""Speeds of shapes with four-bit experts, and how many times those of bf16 in the same memory."""

from dataclasses import dataclass

from fiddler.benchmark.build import build_commit
from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.record import Setting, tokens_per_s
from fiddler.benchmark.subject import Subject
from offload.peaks import measure_peaks
from offload.routing_law import Law
from scripts.bench.engine.shapes import decode, driver_of, loaded_shape, prompt
from scripts.bench.engine.speeds import speed_row
from scripts.bench.rows import Row, at_least

KIND = "w4g128"
LEAST_GAIN = 2.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTargets:
    """Tokens per second of one shape within ``vram_gb`` GiB."""

    shape: str
    vram_gb: float
    written: int
    decode: float
    prompt_2048: float


QWEN = PackedTargets(shape="qwen3-30b-a3b", vram_gb=8, written=128, decode=110, prompt_2048=6000)
MIXTRAL = PackedTargets(shape="mixtral-8x7b", vram_gb=12, written=64, decode=33, prompt_2048=3000)


def packed_rows(targets: PackedTargets, repetitions: int) -> list[Row]:
    """Decode and a prompt with four-bit experts; then decode with bf16 ones."""
    cases = [decode(targets.written), prompt(2048)]
    name = f"{targets.shape}, {KIND}, {targets.vram_gb:g} GiB"
    packed, subject = measured(targets, KIND, cases, repetitions)
    peaks = measure_peaks(
        subject.hardware, num_threads=subject.num_threads, dtype=subject.dtypes.compute
    )
    setting = Setting(subject=subject, peaks=peaks, routing="uniform", build=build_commit())
    rows = [
        speed_row(f"{name}, decode", packed[0], setting, targets.decode),
        speed_row(f"{name}, prompt of 2,048", packed[1], setting, targets.prompt_2048),
    ]
    (of_bf16,), _ = measured(targets, "auto", cases[:1], repetitions)
    plain, _ = tokens_per_s(of_bf16)
    ratio = rows[0].value / plain
    gain = f"{name}, decode, in speeds of bf16"
    return [*rows, at_least(gain, rows[0].value, "tok/s", plain, ratio, LEAST_GAIN)]


def measured(
    targets: PackedTargets, dtype: str, cases: list[Case], repetitions: int
) -> tuple[list[Measurement], Subject]:
    """One load; nothing of it is left when this returns."""
    with loaded_shape(targets.shape, cases, dtype=dtype, vram_gb=targets.vram_gb) as loaded:
        driver = driver_of(loaded, Law())
        return [driver.measure(case, repetitions) for case in cases], Subject.of(loaded)

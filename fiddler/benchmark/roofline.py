"""Measured tests as points of a roofline, and the machine's peaks as its roofs."""

import statistics
from collections.abc import Sequence

from fiddler.benchmark.driver import Measurement
from fiddler.benchmark.record import NS
from fiddler.benchmark.subject import Subject
from fiddler.benchmark.work import done_work, prompt_flops
from fiddler.report.roofline import Point, Roof
from offload.limits import GIGA, TERA, Peaks, Work


def roofs_of(peaks: Peaks) -> list[Roof]:
    """What each memory allows; products were measured where the dense layers run.

    Host memory is that of CPU and PCIe together where there is a GPU: they share what is cold.
    """
    ceiling = peaks.gemm_tflops * TERA
    host = Roof(
        name="host memory",
        kind="cpu",
        bytes_per_s=peaks.joint_gbps * GIGA,
        ceiling_flops=ceiling,
    )
    if not peaks.has_gpu:
        return [host]
    gpu = Roof(
        name="GPU memory",
        kind="gpu",
        bytes_per_s=peaks.gpu_read_gbps * GIGA,
        ceiling_flops=ceiling,
    )
    link = Roof(name="PCIe", kind="link", bytes_per_s=peaks.pcie_gbps * GIGA, ceiling_flops=ceiling)
    return [gpu, host, link]


def points_of(subject: Subject, measurements: Sequence[Measurement]) -> list[Point]:
    """One of each test without a GPU, or of a prompt; two of a test that decodes beside a GPU.

    Tests that read and then write are left out: they are neither.
    """
    points = []
    for measured in measurements:
        case = measured.case
        if case.n_prompt and case.n_gen:
            continue
        seconds = statistics.median(measured.samples_ns) / NS
        label = case.name if case.n_parallel == 1 else f"{case.name} x {case.n_parallel}"
        points += _points(subject, measured, label, seconds)
    return points


def _points(subject: Subject, measured: Measurement, label: str, seconds: float) -> list[Point]:
    work = done_work(subject, measured)
    if measured.case.n_prompt:
        side = work.prompt
        is_streamed = subject.hardware.has_gpu and side.cold_bytes > 0
        if is_streamed:
            return _point(label, "cpu", side.flops, side.cold_bytes, seconds)
        kind = "gpu" if subject.hardware.has_gpu else "cpu"
        return _point(label, kind, side.flops, _all_bytes(side), seconds)
    cold, hot = _decode_flops(subject, measured)
    side = work.decode
    if not subject.hardware.has_gpu:
        return _point(label, "cpu", cold + hot, _all_bytes(side), seconds)
    return [
        *_point(f"{label}, host", "cpu", cold, side.cold_bytes, seconds),
        *_point(f"{label}, GPU", "gpu", hot, side.gpu_bytes, seconds),
    ]


def _point(name: str, kind: str, flops: float, num_bytes: float, seconds: float) -> list[Point]:
    if not (flops and num_bytes and seconds):
        return []
    return [Point(name=name, kind=kind, intensity=flops / num_bytes, flops=flops / seconds)]


def _all_bytes(work: Work) -> float:
    return work.cold_bytes + work.gpu_bytes


def _decode_flops(subject: Subject, measured: Measurement) -> tuple[float, float]:
    """Of one run's cold experts, and of all else, logits of every token included."""
    config, case, tally = subject.config, measured.case, measured.decode
    num_runs = len(measured.samples_ns)
    pairs = int(tally.counts_LE.sum()) / num_runs
    cold = 2 * config.expert_numel * (pairs - tally.num_hot / num_runs)
    head = 2 * config.vocab_size * config.hidden_size
    every = prompt_flops(config, case.prompt_end, case.length) + (case.n_gen - 1) * head
    return cold, case.n_parallel * every - cold

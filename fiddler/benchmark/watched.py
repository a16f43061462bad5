"""More runs of a test, watched from outside: which part of its prediction is wrong.

Watching takes a part of a core, so parts are told beside the whole that they were seen in. What the
CPU workers take is seen at their words (:mod:`fiddler.benchmark.bell_log`); the rest of a
step is the GPU's, or the link's. A prompt says how many experts it had sent over PCIe; how fast
Python starts kernels is measured again behind it.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cpu_kernels.expert_pool import ExpertPool
from fiddler.benchmark.bell_log import BellLog, job_spans
from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Driver, Measurement
from fiddler.benchmark.predicted import CasePrediction, predict_case
from fiddler.benchmark.subject import Subject
from fiddler.benchmark.timeline import Span, within
from fiddler.loading import LoadedModel
from offload.limits import GIGA
from offload.machine_rates import MachineRates
from offload.prediction import STEP_S, Prediction, how_long, is_off
from offload.routing_law import Law

NS = 1_000_000_000
CPU_TERMS = ("cold experts, CPU", "experts")
LINK_TERM = "cold experts, PCIe"
PYTHON_TERM = "step in Python"
MOST_SLOWED = 1.3  # times, by watching: beyond it what was seen may be the watcher's own
FEW_STEPS, RUNS = 12, 3  # a test of few steps is watched several times, and the middle run counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """Means of steps of a kind: their seconds, those of CPU jobs in them, and what PCIe brought.

    ``launch_s``: how long Python takes to start a kernel, after a prompt on a GPU; else 0.
    """

    num_steps: int
    step_s: float
    cpu_s: float
    sent_bytes: float
    launch_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)


def what_is_wrong(
    loaded: LoadedModel,
    driver: Driver,
    measured: Measurement,
    rates: MachineRates | None,
    law: Law | None,
) -> str:
    """What is wrong with a prediction that is far off, from more runs; else nothing.

    ``rates`` None: nothing is predicted.
    """
    if rates is None:
        return ""
    subject = Subject.of(loaded)

    def predict(rates: MachineRates) -> CasePrediction:
        return predict_case(subject, measured, rates, law)

    if not is_off(how_far_off(measured, predict(rates))):
        return ""
    return explain(measured, predict, watch(loaded, driver, measured.case), rates)


def how_far_off(measured: Measurement, predicted: CasePrediction) -> float:
    """The median run's time in units of the predicted one."""
    return statistics.median(measured.samples_ns) / NS / predicted.seconds


def watch(loaded: LoadedModel, driver: Driver, case: Case) -> dict[str, Watched]:
    """Run ``case`` again; what its steps were, under ``prompt`` and ``step`` (of decoding)."""
    runs = [_watch_run(loaded, driver, case)]
    while sum(seen.num_steps for seen in runs[0].values()) < FEW_STEPS and len(runs) < RUNS:
        runs.append(_watch_run(loaded, driver, case))
    seen = {kind: _middle([run[kind] for run in runs]) for kind in runs[0]}
    if "prompt" in seen and loaded.hardware.has_gpu:
        from offload.gpu_rates import python_launch_s

        seen["prompt"] = replace(seen["prompt"], launch_s=python_launch_s())
    return seen


def _middle(runs: list[Watched]) -> Watched:
    return sorted(runs, key=lambda seen: seen.step_s)[len(runs) // 2]


def _watch_run(loaded: LoadedModel, driver: Driver, case: Case) -> dict[str, Watched]:
    pool = loaded.experts.pool
    assert isinstance(pool, ExpertPool)
    bells = BellLog(pool.workers.words, pool.num_threads)
    store = loaded.experts.store
    steps: list[tuple[str, Span, float]] = []
    with ExitStack() as log:
        log.enter_context(loaded.engine.one_by_one())
        for number, is_reading in enumerate(driver.walk(case, run=0)):
            if number == 0:  # what has filled the cache before it is not of interest
                log.enter_context(bells)
            began_ns = time.perf_counter_ns()
            loaded.engine.step()
            if loaded.hardware.has_gpu:
                torch.cuda.synchronize()
            kind = "prompt" if is_reading else "step"
            span = Span(
                process="engine",
                thread="steps",
                name=kind,
                begin_ns=began_ns,
                end_ns=time.perf_counter_ns(),
            )
            record = loaded.experts.prefill_record if is_reading else None
            sent = record.sent_experts * store.mean_expert_bytes if record else 0
            steps.append((kind, span, float(sent)))
    spans = job_spans(bells.looks, {})
    jobs = [s for s in spans if s.thread == "jobs" and not s.name.startswith("phase")]
    kinds = {kind for kind, _, _ in steps}
    return {kind: _mean([(s, sent) for k, s, sent in steps if k == kind], jobs) for kind in kinds}


def explain(
    measured: Measurement,
    predict: Callable[[MachineRates], CasePrediction],
    watched: dict[str, Watched],
    rates: MachineRates,
) -> str:
    """In one line, how far off the prediction is and what it has wrong most."""
    case, predicted = measured.case, predict(rates)
    times = how_far_off(measured, predicted)
    why = _slow_python(measured, predict, watched, rates)
    why = why or _why(times * predicted.seconds, predicted, watched, rates)
    return f"{case.name}, batch {case.n_parallel}, took {how_long(times)}: {why}"


def _slow_python(
    measured: Measurement,
    predict: Callable[[MachineRates], CasePrediction],
    watched: dict[str, Watched],
    rates: MachineRates,
) -> str:
    """Said where a prediction with what a launch takes now would not be far off, else nothing."""
    now, then = watched["prompt"].launch_s if "prompt" in watched else 0.0, rates.python_launch_s
    if not now or not is_off(now / then):  # what is off by more is something else
        return ""
    if is_off(how_far_off(measured, predict(replace(rates, python_launch_s=now)))):
        return ""
    return f"Python starts a kernel in {_us(now)} us, {_us(then)} when it was measured"


def _why(
    measured_s: float, predicted: CasePrediction, watched: dict[str, Watched], rates: MachineRates
) -> str:
    """The worst term; none where the watched run was much slower than the measured ones."""
    slowed = sum(seen.num_steps * seen.step_s for seen in watched.values()) / measured_s
    if slowed > MOST_SLOWED:
        return f"which part is off cannot be told, as watching slowed the run {slowed:.1f} times"
    wrong = [
        _wrong(watched[kind], prediction, rates)
        for kind, prediction in (("prompt", predicted.prompt), ("step", predicted.step))
        if kind in watched and prediction.terms
    ]
    return max(wrong, default=(0.0, "nothing was seen of its steps"))[1]


def _wrong(seen: Watched, foreseen: Prediction, rates: MachineRates) -> tuple[float, str]:
    """By how many seconds of all such steps the worst term is off, and what it is."""
    cpu_s = sum(foreseen.term(name).busy_s for name in CPU_TERMS)
    text = _text("the CPU's experts", seen.cpu_s, seen.step_s, cpu_s)
    sides = [(abs(seen.cpu_s - cpu_s), text)]
    link = foreseen.term(LINK_TERM)
    if link.seconds and seen.sent_bytes:
        gbps = seen.sent_bytes / seen.step_s / GIGA
        known = rates.peaks.pcie_gbps
        text = f"PCIe brought {gbps:.1f} GB/s, {known:.1f} when it was measured"
        sides.append((seen.step_s - seen.sent_bytes / (known * GIGA), text))
    else:
        rest_s = seen.step_s - seen.cpu_s
        hidden_s = sum(foreseen.term(name).seconds for name in CPU_TERMS)
        # watched steps come one by one, so what Python takes is not beside another step
        python_s = max(STEP_S - foreseen.term(PYTHON_TERM).seconds, 0.0)
        foreseen_s = foreseen.seconds - hidden_s + python_s
        text = _text("everything but the CPU's experts", rest_s, seen.step_s, foreseen_s)
        sides.append((abs(rest_s - foreseen_s), text))
    off_s, text = max(sides)
    return off_s * seen.num_steps, text


def _text(what: str, seen_s: float, step_s: float, foreseen_s: float) -> str:
    watched = f"{_ms(seen_s)} of a watched step's {_ms(step_s)} ms"
    return f"{what} took {watched}, {_ms(foreseen_s)} foreseen"


def _ms(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f}"


def _mean(steps: Sequence[tuple[Span, float]], jobs: Sequence[Span]) -> Watched:
    seconds = [(span.end_ns - span.begin_ns) / NS for span, _ in steps]
    busy = [sum(j.end_ns - j.begin_ns for j in within(jobs, span)) / NS for span, _ in steps]
    return Watched(
        num_steps=len(steps),
        step_s=statistics.mean(seconds),
        cpu_s=statistics.mean(busy),
        sent_bytes=statistics.mean(sent for _, sent in steps),
    )

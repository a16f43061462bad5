"""A timeline of one step that reads a prompt and one that decodes: engine, CPU workers and GPU."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from cpu_kernels.expert_pool import ExpertPool
from fiddler.benchmark.bell_log import BellLog, job_spans
from fiddler.benchmark.cases import Case
from fiddler.benchmark.driver import Driver
from fiddler.benchmark.gpu_log import GpuLog
from fiddler.benchmark.timeline import Span, chrome_trace, within
from fiddler.loading import LoadedModel

NUM_GEN = 3  # steps that decode; the second is recorded, when the first has warmed the caches


def trace_case(cases: Sequence[Case]) -> Case:
    """What is run for a timeline: the longest prompt of ``cases``, if any, and a short answer."""
    first = cases[0]
    return Case(
        n_prompt=max(case.n_prompt for case in cases),
        n_gen=NUM_GEN if any(case.n_gen for case in cases) else 0,
        n_depth=first.n_depth,
        n_parallel=first.n_parallel,
    )


def trace(loaded: LoadedModel, driver: Driver, case: Case) -> dict[str, Any]:
    """Run ``case`` twice and record two steps of the second run, as a Chrome trace."""
    with loaded.engine.one_by_one():
        return _trace(loaded, driver, case)


def _trace(loaded: LoadedModel, driver: Driver, case: Case) -> dict[str, Any]:
    for _ in driver.walk(case, run=0):
        loaded.engine.step()
    pool = loaded.experts.pool
    assert isinstance(pool, ExpertPool)
    bells = BellLog(pool.workers.words, pool.num_threads)
    gpu = GpuLog() if loaded.hardware.has_gpu else None
    steps = _recorded_steps(loaded, driver.walk(case, run=1), bells, gpu)
    names = {job: f"layer {layer}" for job, layer in loaded.experts.jobs.items()}
    others = job_spans(bells.looks, names) + (gpu.spans() if gpu is not None else [])
    spans = [*steps, *(part for step in steps for part in within(others, step))]
    facts = {
        "model": f"{loaded.files.name} {loaded.dtypes.weights}",
        "test": f"{case.name}, batch {case.n_parallel}",
        "cpu": loaded.hardware.cpu_name,
        "gpu": loaded.hardware.gpu_name,
        "us_between_looks_at_the_workers": round(bells.gap_us, 1),
    }
    return chrome_trace(spans, facts)


def has_gpu_rows(found: dict[str, Any]) -> bool:
    """Whether a trace has anything of a GPU."""
    return any(event.get("cat") == "GPU" for event in found["traceEvents"])


def _recorded_steps(
    loaded: LoadedModel, walk: Iterator[bool], bells: BellLog, gpu: GpuLog | None
) -> list[Span]:
    """The first step that reads and the second that decodes, while the logs are kept."""
    reading: list[Span] = []
    decoding: list[Span] = []
    with ExitStack() as logs:
        for number, is_reading in enumerate(walk):
            if number == 0:  # what has filled the cache before it is not of interest
                logs.enter_context(bells)
                if gpu is not None:
                    logs.enter_context(gpu)
            began_ns = time.perf_counter_ns()
            loaded.engine.step()
            if gpu is not None:
                torch.cuda.synchronize()
            ended_ns = time.perf_counter_ns()
            name = "prompt" if is_reading else "decode"
            num_tokens = len(loaded.experts.routing.hot_T)
            (reading if is_reading else decoding).append(
                Span(
                    process="engine",
                    thread="steps",
                    name=f"{name}, {num_tokens} token{'s' * (num_tokens > 1)}",
                    begin_ns=began_ns,
                    end_ns=ended_ns,
                )
            )
    return reading[:1] + decoding[1:2]

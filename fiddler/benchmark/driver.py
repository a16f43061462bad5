"""Runs tests on a loaded model: requests go straight into the scheduler, and steps are timed."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fiddler.benchmark.cases import Case
from fiddler.benchmark.requests import CaseRequests
from fiddler.benchmark.routing import DrawnRouting
from fiddler.benchmark.tally import Tally
from fiddler.config import EngineConfig
from fiddler.engine.request import Request
from fiddler.errors import ConfigError
from fiddler.loading import LoadedModel, Progress, load_model
from offload.plan import Plan
from offload.prefill_record import StepRecord
from offload.step_routing import StepRouting


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """The runs of one test; ``started`` is ISO 8601.

    ``prompt`` counts the steps of all runs in which any request still read, ``decode`` the others.
    ``link_bytes``: of experts that went over PCIe, copied or read by the GPU, in all runs.
    """

    case: Case
    started: str
    samples_ns: list[int]
    prompt: Tally
    decode: Tally
    peak_vram_bytes: int
    link_bytes: float = 0.0


@dataclass(slots=True)
class Run:
    """What one run's steps chose, and the time they took together; ``divided``: its large steps."""

    elapsed_ns: int = 0
    prompt: list[StepRouting] = field(default_factory=list)
    decode: list[StepRouting] = field(default_factory=list)
    divided: list[StepRecord] = field(default_factory=list)


def load(settings: EngineConfig, cases: list[Case], on_progress: Progress | None) -> LoadedModel:
    """Load a model for ``cases``; where one does not fit, that is said before weights are read."""

    def check_plan(plan: Plan) -> None:
        for case in cases:
            if case.num_pages(plan.page_size) > plan.num_pages:
                raise ConfigError(
                    f"{case.name} with a batch of {case.n_parallel} holds "
                    f"{case.n_parallel * case.length:,} tokens, but the KV cache has room for "
                    f"{plan.num_pages * plan.page_size:,}",
                    hint="lower --batch, -d, -p or -n, or give more memory",
                )

    loaded = load_model(settings, on_progress, check_plan=check_plan)
    gc.freeze()  # as the commands that answer do
    return loaded


class Driver:
    """Measures tests on a loaded model; its routers choose for themselves without a ``routing``."""

    def __init__(self, loaded: LoadedModel, *, routing: DrawnRouting | None, seed: int) -> None:
        self._loaded = loaded
        self._seed = seed
        self._routing = routing

    def measure(self, case: Case, repetitions: int) -> Measurement:
        """Run ``case`` once to warm up and then ``repetitions`` times by the clock.

        Tokens and experts differ from run to run, so that no placement fits them all by chance.
        """
        loaded, config = self._loaded, self._loaded.files.config
        started = datetime.now(UTC).isoformat(timespec="seconds")
        requests = CaseRequests(case, loaded.pages, vocab_size=config.vocab_size, seed=self._seed)
        self._run(requests.filling(), case)
        if self._routing is not None:
            self._routing.prepare(case.n_parallel, (repetitions + 1) * case.new_tokens)
        _, *runs = [self._run_drawn(requests, case, run) for run in range(repetitions + 1)]
        requests.close()
        return Measurement(
            case=case,
            started=started,
            samples_ns=[run.elapsed_ns for run in runs],
            prompt=self._tally([step for run in runs for step in run.prompt]),
            decode=self._tally([step for run in runs for step in run.decode]),
            peak_vram_bytes=loaded.peak_vram_bytes(),
            link_bytes=sum(map(self._link_bytes, runs)),
        )

    def walk(self, case: Case, run: int) -> Iterator[bool]:
        """Make run ``run`` of ``case`` ready; say before each step whether any request still reads.

        Who iterates makes the steps, one each time.
        """
        loaded, vocab_size = self._loaded, self._loaded.files.config.vocab_size
        requests = CaseRequests(case, loaded.pages, vocab_size=vocab_size, seed=self._seed)
        self._run(requests.filling(), case)
        if self._routing is not None:
            self._routing.prepare(case.n_parallel, (run + 1) * case.new_tokens)
            self._routing.shift = run * case.new_tokens - case.n_depth
        loaded.runner.draw_experts = self._routing
        try:
            yield from self._steps(requests.of_run(run), case)
        finally:
            loaded.runner.draw_experts = None
            requests.close()

    def _run_drawn(self, requests: CaseRequests, case: Case, run: int) -> Run:
        """A run whose experts follow the law, if there is one, where the run before ended."""
        if self._routing is not None:
            self._routing.shift = run * case.new_tokens - case.n_depth
        self._loaded.runner.draw_experts = self._routing
        done = self._run(requests.of_run(run), case)
        self._loaded.runner.draw_experts = None
        return done

    def _run(self, requests: list[Request], case: Case) -> Run:
        """Step until all requests are finished."""
        engine, experts, run = self._loaded.engine, self._loaded.experts, Run()
        last = experts.prefill_record
        started = time.perf_counter_ns()
        for is_reading in self._steps(requests, case):
            engine.step()
            (run.prompt if is_reading else run.decode).append(experts.routing)
            if experts.prefill_record is not last and (last := experts.prefill_record):
                run.divided.append(last)
        run.elapsed_ns = time.perf_counter_ns() - started
        return run

    def _link_bytes(self, run: Run) -> float:
        """Of whole experts in large steps, and of their rows where the GPU decodes."""
        each, steps = self._loaded.experts.store.mean_expert_bytes, self._loaded.runner.decode_steps
        sent = sum(record.sent_experts for record in run.divided) * each
        return sent + (sum(map(steps.pulled_bytes, run.decode)) if steps is not None else 0.0)

    def _steps(self, requests: list[Request], case: Case) -> Iterator[bool]:
        """Before each step of ``requests``, until all are finished: does any still read?"""
        scheduler = self._loaded.engine.scheduler
        scheduler.running.extend(requests)
        while scheduler.has_work:
            yield any(request.num_computed < case.prompt_end for request in requests)

    def _tally(self, steps: list[StepRouting]) -> Tally:
        config = self._loaded.files.config
        tally = Tally(config.num_layers, config.num_experts)
        for step in steps:
            tally.add(step.ids, step.is_resident_LE)
        return tally

"""The engine with steps put behind steps: requests end, come and go as if each step was awaited.

A pretend device runs what is on its stream as late as it may, when the host waits for it. It keeps
at each slot the whole text up to its token, so a slot that is written by a step that came too late,
or for somebody who is gone, shows up as a wrong text.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fiddler.engine.engine import Engine
from fiddler.engine.pages import PagePool
from fiddler.engine.prefix_cache import PrefixCache
from fiddler.engine.request import Request
from fiddler.engine.runner import Forwarded, Started
from fiddler.engine.scheduler import Schedule, Scheduler
from fiddler.errors import WorkerError
from fiddler.sampling_params import SamplingParams

PAGE = 4
NUM_PAGES = 12
CONTEXT = NUM_PAGES * PAGE
VOCAB = 5

Text = tuple[int, ...]


def next_token(text: Text) -> int:
    return (sum(text) * 7 + len(text)) % VOCAB


@dataclass
class PretendStep:
    """On the stream: a text for each chunk, or those of the step ``before`` with what it draws."""

    schedule: Schedule
    pages: list[list[int]]
    texts: list[Text]
    before: "PretendStep | None" = None
    drawn: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(chunk.num_tokens for chunk in self.schedule.chunks)


class PretendRunner:
    """Runs steps in their order, each when it is collected or something behind it is."""

    def __init__(self) -> None:
        self.kv: list[list[Text]] = [[()] * PAGE for _ in range(NUM_PAGES)]
        self.stream: deque[PretendStep] = deque()
        self.may_run_ahead: Callable[[], bool] = lambda: True
        self.num_ahead = 0
        self.fails_in = 10**9

    def start(self, schedule: Schedule) -> Started:
        assert not self.stream
        texts = [tuple(c.request.tokens[: c.end]) for c in schedule.chunks]
        return self._put(PretendStep(schedule, self._pages(schedule), texts))

    def may_follow(self, started: Started, schedule: Schedule) -> bool:
        return not started.schedule.prefills and self.may_run_ahead()

    def start_next(self, started: Started, schedule: Schedule) -> Started:
        before: Any = started.found
        self.num_ahead += 1
        return self._put(PretendStep(schedule, self._pages(schedule), [], before))

    def collect(self, started: Started) -> Forwarded:
        step: Any = started.found
        while step in self.stream:
            self._run(self.stream.popleft())
        rows = torch.zeros(step.num_rows, 1)
        return Forwarded(rows, rows, step.drawn)

    def abandon(self) -> None:
        self.stream.clear()

    def _pages(self, schedule: Schedule) -> list[list[int]]:
        return [list(c.request.pages) for c in schedule.chunks]

    def _put(self, step: PretendStep) -> Started:
        assert len(self.stream) <= 1
        self.stream.append(step)
        found: Any = step
        return Started(step.schedule, found)

    def _run(self, step: PretendStep) -> None:
        self.fails_in -= 1
        if self.fails_in == 0:
            raise WorkerError("the workers have failed")
        for source, target in step.schedule.page_copies:
            self.kv[target] = list(self.kv[source])
        if step.before is not None:
            ends = np.cumsum([c.num_tokens for c in step.before.schedule.chunks]) - 1
            both = zip(step.before.texts, ends, strict=True)
            step.texts = [(*text, step.before.drawn[end]) for text, end in both]
        for chunk, pages, text in zip(step.schedule.chunks, step.pages, step.texts, strict=True):
            assert len(text) == chunk.end
            for position in range(chunk.start, chunk.end):
                self.kv[pages[position // PAGE]][position % PAGE] = text[: position + 1]
        for chunk, pages, text in zip(step.schedule.chunks, step.pages, step.texts, strict=True):
            for position in range(chunk.end):
                assert self.kv[pages[position // PAGE]][position % PAGE] == text[: position + 1]
            step.drawn += [-1] * (chunk.num_tokens - 1) + [next_token(text)]


class PretendExperts:
    """As many choices as tokens, so that they can be counted."""

    def __init__(self) -> None:
        ones = np.ones(CONTEXT * 8, np.int64)
        self.routing: Any = type("Routing", (), {"hot_T": ones, "cold_T": 2 * ones})()

    def begin_step(self, num_tokens: int) -> None:
        pass


class Pretend:
    def __init__(self, *, use_cache: bool, max_num_seqs: int, max_batched_tokens: int) -> None:
        self.pool = PagePool(NUM_PAGES)
        self.cache = PrefixCache(self.pool, PAGE) if use_cache else None
        self.runner = PretendRunner()
        runner, experts = self.runner, PretendExperts()
        typed: tuple[Any, Any] = (runner, experts)
        self.engine = Engine(
            Scheduler(
                self.pool,
                self.cache,
                page_size=PAGE,
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max_batched_tokens,
            ),
            *typed,
            eos_ids=frozenset({VOCAB - 1}),
            decode_token=str,
        )

    def add(self, prompt: list[int], max_tokens: int, **params: Any) -> Request:
        request = Request(
            prompt_ids=prompt,
            params=SamplingParams(**params),
            max_tokens=min(max_tokens, CONTEXT - len(prompt)),
            seed=0,
        )
        self.engine.scheduler.add(request)
        return request

    def finish(self) -> None:
        while self.engine.scheduler.has_work:
            self.engine.step()


def alone(request: Request) -> list[int]:
    """What it would make if nothing stopped it from outside."""
    text: Text = tuple(request.prompt_ids)
    made: list[int] = []
    while len(made) < request.max_tokens:
        made.append(next_token(text))
        text = (*text, made[-1])
        if made[-1] == VOCAB - 1 and not request.params.ignore_eos:
            break
    return made


arrivals = st.lists(
    st.tuples(
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),  # prompt
        st.integers(1, 16),  # tokens to make
        st.booleans(),  # goes on behind the end of the text
        st.integers(0, 8),  # steps before it arrives
        st.one_of(st.none(), st.integers(0, 12)),  # steps until it is cancelled
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200)
@given(arrivals, st.booleans(), st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**32))
def test_every_request_runs_as_if_alone_and_no_page_is_lost(
    arrivals: list[tuple[list[int], int, bool, int, int | None]],
    use_cache: bool,
    max_num_seqs: int,
    max_batched_tokens: int,
    seed: int,
) -> None:
    model = Pretend(
        use_cache=use_cache, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens
    )
    rng = np.random.default_rng(seed)
    model.runner.may_run_ahead = lambda: bool(rng.integers(4))
    queue = deque(sorted(arrivals, key=lambda a: a[3]))
    everyone: list[Request] = []
    cancel_at: dict[int, list[Request]] = {}
    step = 0
    while queue or model.engine.scheduler.has_work:
        while queue and queue[0][3] <= step:
            prompt, max_tokens, goes_on, _, cancel = queue.popleft()
            everyone.append(model.add(prompt, max_tokens, ignore_eos=goes_on))
            if cancel is not None:
                cancel_at.setdefault(step + cancel, []).append(everyone[-1])
        for request in cancel_at.pop(step, []):
            model.engine.cancel(request)
        if model.engine.scheduler.has_work:
            model.engine.step()
        step += 1
        assert step < 5_000, "no progress"
    assert not model.runner.stream, "something runs that nobody needs"
    for request in everyone:
        wanted = alone(request)
        whole = request.finish_reason != "cancelled"
        assert request.output_ids == (wanted if whole else wanted[: request.num_outputs])
        assert request.pages == []
    if model.cache is not None:
        model.cache.clear()
    assert model.pool.num_free == NUM_PAGES


def test_tokens_are_made_one_step_after_the_other_but_the_last() -> None:
    model = Pretend(use_cache=True, max_num_seqs=2, max_batched_tokens=64)
    request = model.add([1, 2, 3], 9, ignore_eos=True)
    model.finish()
    assert request.num_outputs == 9
    # the prompt's step gives the first token, the next step is started as usual
    assert model.runner.num_ahead == 9 - 2
    assert request.expert_tokens_gpu == 3 + 8 and request.expert_tokens_cpu == 2 * 11


def test_what_ends_by_itself_is_counted_once() -> None:
    """The step behind its last token runs for nothing."""
    model = Pretend(use_cache=False, max_num_seqs=2, max_batched_tokens=64)
    prompt = next(p for p in ([n] for n in range(VOCAB)) if 2 < len(alone(asking(p))) < 20)
    request = model.add(prompt, 30)
    model.finish()
    assert request.finish_reason == "stop"
    assert model.runner.num_ahead == request.num_outputs - 1
    assert request.expert_tokens_gpu == len(prompt) + request.num_outputs - 1


@pytest.mark.parametrize("ends", ["by itself", "by a cancel"])
def test_a_failure_of_a_step_that_nobody_needs_is_not_told(ends: str) -> None:
    model = Pretend(use_cache=False, max_num_seqs=2, max_batched_tokens=64)
    prompt = next(p for p in ([n] for n in range(VOCAB)) if 2 < len(alone(asking(p))) < 20)
    wanted = alone(asking(prompt))
    request = model.add(prompt, 30)
    if ends == "by itself":
        model.runner.fails_in = len(wanted) + 1
        model.finish()
        assert request.output_ids == wanted
    else:
        model.engine.step()
        model.engine.step()
        model.runner.fails_in = 1
        model.engine.cancel(request)
        assert request.output_ids == wanted[:2]
    assert model.runner.fails_in == 0 and not model.runner.stream
    second = model.add(prompt, 30)
    model.finish()
    assert second.output_ids == wanted


def asking(prompt: list[int]) -> Request:
    return Request(prompt_ids=prompt, params=SamplingParams(), max_tokens=30, seed=0)


@pytest.mark.parametrize(
    "params",
    [{"logprobs": 0}, {"repetition_penalty": 1.2}, {"logit_bias": {1: 2.0}}, {"min_tokens": 20}],
)
def test_who_asks_for_more_than_a_draw_is_awaited(params: dict[str, Any]) -> None:
    model = Pretend(use_cache=False, max_num_seqs=2, max_batched_tokens=64)
    request = model.add([1, 2], 6, ignore_eos=True, **params)
    started = model.engine._start(model.engine.scheduler.schedule())
    model.runner.collect(started)
    request.tokens.append(0)
    request.num_computed = 2
    assert model.engine._start_next(model.engine._start(model.engine.scheduler.schedule())) is None
    assert model.runner.num_ahead == 0


def test_after_a_failure_nothing_is_under_way_and_the_next_request_runs() -> None:
    model = Pretend(use_cache=True, max_num_seqs=2, max_batched_tokens=64)
    lost = model.add([1, 2, 3], 9, ignore_eos=True)
    model.runner.fails_in = 4
    with pytest.raises(WorkerError):
        model.finish()
    assert lost.finish_reason == "cancelled" and not model.runner.stream
    request = model.add([3, 2, 1], 9, ignore_eos=True)
    model.finish()
    assert request.output_ids == alone(request)


def test_who_waits_for_a_place_is_let_in() -> None:
    model = Pretend(use_cache=False, max_num_seqs=2, max_batched_tokens=64)
    first = model.add([1], 20, ignore_eos=True)
    model.engine.step()
    model.engine.step()
    assert model.runner.num_ahead == 1
    second = model.add([2], 3, ignore_eos=True)
    model.engine.step()  # ends what is ahead, with nothing behind it
    assert model.runner.num_ahead == 1
    model.engine.step()
    assert second.num_outputs == 1
    third = model.add([3], 3, ignore_eos=True)  # there is no place: the others run ahead
    model.engine.step()
    assert model.runner.num_ahead == 2 and third.num_outputs == 0
    model.finish()
    for request in (first, second, third):
        assert request.output_ids == alone(request)

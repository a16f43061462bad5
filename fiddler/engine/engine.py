"""The engine: token ids in, token ids out. ``step`` is the architecture.

It knows nothing of text; stop strings and detokenisation live above it.

While a step that decodes is under way, the next one is put behind it where nothing but tokens is
unknown of that, so a device that decodes never waits for Python. Who turns out to have ended with
the first of them is passed over in the second.
"""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from fiddler.engine.logprobs import DecodeToken, token_logprobs
from fiddler.engine.request import Request
from fiddler.engine.runner import Forwarded, Runner, Started
from fiddler.engine.sampler import adjusts, sample
from fiddler.engine.scheduler import Chunk, Schedule, Scheduler
from fiddler.errors import WorkerError
from fiddler.models.footprint import logit_rows
from fiddler.outputs import FinishReason, Logprob
from offload.executor import HybridExperts

ChunkRows = tuple[Chunk, slice]  # and its rows of the step's arrays


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One new token of one request; the request itself says whether it is finished."""

    request: Request
    token_id: int
    logprobs: dict[int, Logprob] | None


class Engine:
    """Runs requests together, one step at a time. Not thread-safe: one caller steps it."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        experts: HybridExperts,
        *,
        eos_ids: frozenset[int],
        decode_token: DecodeToken,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
        self._experts = experts
        self._eos_ids = eos_ids
        self._decode_token = decode_token
        self._ahead: Started | None = None  # has requests that are not finished
        self._may_run_ahead = True

    def step(self) -> list[StepOutput]:
        """Schedule, run, sample, emit. Returns the tokens that became known.

        An error ends every request: their KV may be half written.
        """
        try:
            began = time.perf_counter()
            started = self._ahead or self._start(self.scheduler.schedule())
            self._ahead = self._start_next(started)
            forwarded = self._runner.collect(started)
            rows = _live_rows(started.schedule)
            outputs = self._commit(rows, self._sample(rows, forwarded))
            self._end_idle()
            self.scheduler.took(started.schedule, time.perf_counter() - began)
            return outputs
        except BaseException:
            self._drop_all()
            raise

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Within, no step starts before the one before it has ended: for who watches one alone."""
        self._may_run_ahead = False
        try:
            yield
        finally:
            self._may_run_ahead = True

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """End a request now and give back its pages. Idempotent."""
        if not request.is_finished:
            request.finish_reason = reason
        self.scheduler.finish(request)
        self._end_idle()

    def _start(self, schedule: Schedule) -> Started:
        now = time.perf_counter()
        for chunk in schedule.prefills:
            chunk.request.admitted_s = chunk.request.admitted_s or now
        self._experts.begin_step(sum(c.num_tokens for c in schedule.chunks))
        return self._runner.start(schedule)

    def _start_next(self, started: Started) -> Started | None:
        """The step behind ``started``, if that one's tokens are all that is unknown of it."""
        following = started.schedule.next_decodes
        may_follow = (
            self._may_run_ahead
            and all(_goes_on(chunk.request) for chunk in started.schedule.decodes)
            and self._runner.may_follow(started, following)
            and self.scheduler.may_follow(started.schedule)
        )
        return self._runner.start_next(started, following) if may_follow else None

    def _end_idle(self) -> None:
        """Wait for a step ahead that nobody needs any more, so that nothing runs unasked.

        If its workers fail that is nobody's failure; the next step has new ones.
        """
        ahead = self._ahead
        if ahead is not None and all(c.request.is_finished for c in ahead.schedule.chunks):
            self._ahead = None
            with suppress(WorkerError):
                self._runner.collect(ahead)

    def _drop_all(self) -> None:
        self._ahead = None
        try:
            self._runner.abandon()
        finally:
            for request in self.scheduler.drop_all():
                request.finish_reason = "cancelled"

    @torch.inference_mode()
    def _sample(self, rows: list[ChunkRows], forwarded: Forwarded) -> list[StepOutput]:
        hidden_TH = forwarded.hidden_TH
        for chunk, at in rows:
            if chunk.request.params.prompt_logprobs is not None:
                self._prompt_logprobs(chunk, hidden_TH[at])
            if chunk.request.reader is not None:
                self._show_logits(chunk, hidden_TH[at])
        last = [(chunk.request, at.stop - 1) for chunk, at in rows if chunk.is_last]
        if not last:
            return []
        requests, last_rows = [request for request, _ in last], [row for _, row in last]
        logits_RV = self._logits(forwarded, last_rows)
        drawn_ids = forwarded.drawn_ids and [forwarded.drawn_ids[row] for row in last_rows]
        tokens = sample(logits_RV, requests, self._eos_ids, drawn_ids)
        return [
            StepOutput(request, token, self._logprobs(request, token, logits_RV[r : r + 1]))
            for r, (request, token) in enumerate(zip(requests, tokens, strict=True))
        ]

    def _logits(self, forwarded: Forwarded, rows: list[int]) -> torch.Tensor:
        """Of these rows; a step that decodes has them all, and mostly all are asked for."""
        logits_TV, hidden_TH = forwarded.logits_TV, forwarded.hidden_TH
        if logits_TV is not None and len(rows) == len(logits_TV):
            return logits_TV
        rows_R = torch.as_tensor(rows, device=hidden_TH.device)
        if logits_TV is not None:
            return logits_TV[rows_R]
        return self._runner.decoder.logits(hidden_TH[rows_R])

    def _commit(self, rows: list[ChunkRows], outputs: list[StepOutput]) -> list[StepOutput]:
        self._record_routing(rows)
        for chunk, _ in rows:
            chunk.request.num_computed = chunk.end
        now = time.perf_counter()
        for output in outputs:
            request = output.request
            request.tokens.append(output.token_id)
            request.last_token_s = now
            if request.num_outputs == 1:
                request.first_token_s = now
                self.scheduler.remember(request)
            self._check_finished(request, output.token_id)
            if request.is_finished:
                self.scheduler.finish(request)
        return outputs

    def _check_finished(self, request: Request, token: int) -> None:
        if token in request.params.stop_token_ids:
            request.finish_reason, request.stop_reason = "stop", token
        elif token in self._eos_ids and not request.params.ignore_eos:
            request.finish_reason = "stop"
        elif request.num_outputs >= request.max_tokens:
            request.finish_reason = "length"

    def _record_routing(self, rows: list[ChunkRows]) -> None:
        routing = self._experts.routing
        for chunk, at in rows:
            chunk.request.expert_tokens_gpu += int(routing.hot_T[at].sum())
            chunk.request.expert_tokens_cpu += int(routing.cold_T[at].sum())
            if chunk.request.params.routed_experts:
                chunk.request.routed.append(self._experts.routed_ids(at))

    def _logprobs(
        self, request: Request, token: int, logits_1V: torch.Tensor
    ) -> dict[int, Logprob] | None:
        num_top = request.params.logprobs
        if num_top is None:
            return None
        return token_logprobs(logits_1V, [token], num_top, self._decode_token)[0]

    def _prompt_logprobs(self, chunk: Chunk, hidden_TH: torch.Tensor) -> None:
        """Row t predicts prompt token ``start + t + 1``; the first token has no prediction."""
        request, num_top = chunk.request, chunk.request.params.prompt_logprobs
        assert num_top is not None
        if chunk.start == 0:
            request.prompt_logprobs.append(None)
        targets = request.prompt_ids[chunk.start + 1 : chunk.end + 1]
        num_rows = logit_rows(on_gpu=hidden_TH.is_cuda)
        for first in range(0, len(targets), num_rows):
            some = targets[first : first + num_rows]
            logits_RV = self._runner.decoder.logits(hidden_TH[first : first + len(some)])
            request.prompt_logprobs += token_logprobs(logits_RV, some, num_top, self._decode_token)

    def _show_logits(self, chunk: Chunk, hidden_TH: torch.Tensor) -> None:
        """The prompt's last row is left out: what it predicts is not in the prompt."""
        request, reader = chunk.request, chunk.request.reader
        assert reader is not None
        end = min(chunk.end, len(request.prompt_ids) - 1)
        num_rows = logit_rows(on_gpu=hidden_TH.is_cuda)
        for row in range(max(chunk.start, reader.first), end, num_rows):
            rows = slice(row - chunk.start, min(row + num_rows, end) - chunk.start)
            reader.read(row, self._runner.decoder.logits(hidden_TH[rows]))


def _live_rows(schedule: Schedule) -> list[ChunkRows]:
    """The chunks of a step with their rows, but for requests that have ended meanwhile."""
    ends = itertools.accumulate(chunk.num_tokens for chunk in schedule.chunks)
    return [
        (chunk, slice(end - chunk.num_tokens, end))
        for chunk, end in zip(schedule.chunks, ends, strict=True)
        if not chunk.request.is_finished
    ]


def _goes_on(request: Request) -> bool:
    """Whether it will decode again after this step, and asks for no more than what is drawn.

    It may end all the same, by what it draws.
    """
    is_plain = request.params.logprobs is None and not adjusts(request)
    return is_plain and request.num_outputs + 1 < request.max_tokens

"""The engine: token ids in, token ids out. ``step`` is the architecture.

It knows nothing of text; stop strings and detokenisation live above it.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from fiddler.engine.logprobs import DecodeToken, token_logprobs
from fiddler.engine.request import Request
from fiddler.engine.runner import Forwarded, Runner
from fiddler.engine.sampler import is_plain_greedy, not_finite, sample
from fiddler.engine.scheduler import Chunk, Schedule, Scheduler
from fiddler.models.footprint import LOGIT_ROWS
from fiddler.outputs import FinishReason, Logprob
from offload.executor import HybridExperts


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

    def step(self) -> list[StepOutput]:
        """Schedule, run, sample, emit. Returns the tokens that became known.

        An error ends every request: their KV may be half written.
        """
        try:
            schedule = self.scheduler.schedule()
            forwarded = self._forward(schedule)
            return self._commit(schedule, self._sample(schedule, forwarded))
        except BaseException:
            for request in self.scheduler.drop_all():
                request.finish_reason = "cancelled"
            raise

    def cancel(self, request: Request, reason: FinishReason = "cancelled") -> None:
        """End a request now and give back its pages. Idempotent."""
        if not request.is_finished:
            request.finish_reason = reason
        self.scheduler.finish(request)

    def _forward(self, schedule: Schedule) -> Forwarded:
        now = time.perf_counter()
        for chunk in schedule.prefills:
            chunk.request.admitted_s = chunk.request.admitted_s or now
        self._experts.begin_step(sum(c.num_tokens for c in schedule.chunks))
        return self._runner.forward(schedule)

    @torch.inference_mode()
    def _sample(self, schedule: Schedule, forwarded: Forwarded) -> list[StepOutput]:
        hidden_TH = forwarded.hidden_TH
        ends = np.cumsum([c.num_tokens for c in schedule.chunks])
        for chunk, end in zip(schedule.chunks, ends, strict=True):
            if chunk.request.params.prompt_logprobs is not None:
                self._prompt_logprobs(chunk, hidden_TH[end - chunk.num_tokens : end])
            if chunk.request.reader is not None:
                self._show_logits(chunk, hidden_TH[end - chunk.num_tokens : end])
        last = [
            (c.request, end - 1) for c, end in zip(schedule.chunks, ends, strict=True) if c.is_last
        ]
        if not last:
            return []
        requests = [request for request, _ in last]
        logits_RV = forwarded.logits_TV  # of decode steps, where every row is a request's last
        if logits_RV is None:
            rows_R = torch.as_tensor([row for _, row in last], device=hidden_TH.device)
            logits_RV = self._runner.decoder.logits(hidden_TH[rows_R])
        tokens = self._greedy_tokens(forwarded, requests)
        if tokens is None:
            tokens = sample(logits_RV, requests, self._eos_ids)
        return [
            StepOutput(request, token, self._logprobs(request, token, logits_RV[r : r + 1]))
            for r, (request, token) in enumerate(zip(requests, tokens, strict=True))
        ]

    def _greedy_tokens(self, forwarded: Forwarded, requests: list[Request]) -> list[int] | None:
        """What the device has chosen, if that is all that the requests ask for."""
        tokens = forwarded.greedy_ids
        if tokens is None or not all(map(is_plain_greedy, requests)):
            return None
        if min(tokens) < 0:
            raise not_finite()
        return tokens

    def _commit(self, schedule: Schedule, outputs: list[StepOutput]) -> list[StepOutput]:
        self._record_routing(schedule)
        for chunk in schedule.chunks:
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

    def _record_routing(self, schedule: Schedule) -> None:
        routing = self._experts.routing
        start = 0
        for chunk in schedule.chunks:
            rows = slice(start, start + chunk.num_tokens)
            chunk.request.expert_tokens_gpu += int(routing.hot_T[rows].sum())
            chunk.request.expert_tokens_cpu += int(routing.cold_T[rows].sum())
            if chunk.request.params.routed_experts:
                chunk.request.routed.append(self._experts.routed_ids(rows))
            start += chunk.num_tokens

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
        for first in range(0, len(targets), LOGIT_ROWS):
            some = targets[first : first + LOGIT_ROWS]
            logits_RV = self._runner.decoder.logits(hidden_TH[first : first + len(some)])
            request.prompt_logprobs += token_logprobs(logits_RV, some, num_top, self._decode_token)

    def _show_logits(self, chunk: Chunk, hidden_TH: torch.Tensor) -> None:
        """The prompt's last row is left out: what it predicts is not in the prompt."""
        request, reader = chunk.request, chunk.request.reader
        assert reader is not None
        end = min(chunk.end, len(request.prompt_ids) - 1)
        for row in range(max(chunk.start, reader.first), end, LOGIT_ROWS):
            rows = slice(row - chunk.start, min(row + LOGIT_ROWS, end) - chunk.start)
            reader.read(row, self._runner.decoder.logits(hidden_TH[rows]))

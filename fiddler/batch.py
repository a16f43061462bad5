"""The one batch of a model, which any number of threads feed and drive.

Ordering: any number of threads may call. One lock is held for a whole step, and whenever a request
enters or leaves; a sample's events are made under it and may be taken without it. A stream that
the collector finds only appends to ``_abandoned``: its request is cancelled before the next step.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from fiddler.checked_prompt import CheckedPrompt
from fiddler.engine.request import LogitReader, Request
from fiddler.errors import ConfigError
from fiddler.loading import LoadedModel
from fiddler.outputs import RequestOutput, RunStats
from fiddler.stream import Sample, TokenStream, raise_failure


class Entry(NamedTuple):
    """A prompt in the batch, and its samples."""

    prompt: CheckedPrompt
    samples: list[Sample]


class Batch:
    """Requests of a loaded model, from their entry to their last event.

    ``close`` gives back the model; what is asked for afterwards is a ConfigError. A request without
    a seed has one that ``seed`` and its number make.
    """

    def __init__(self, loaded: LoadedModel, seed: int) -> None:
        self._loaded: LoadedModel | None = loaded
        self._process = os.getpid()
        self._seed = seed
        self._samples: dict[int, Sample] = {}
        self._abandoned: deque[Request] = deque()  # appended to without the lock
        self._lock = threading.RLock()
        self._request_count = itertools.count()

    @property
    def running(self) -> LoadedModel:
        """The model; ConfigError once it is closed, and in a fork of its process."""
        if self._is_forked:
            raise ConfigError(
                "this LLM belongs to the process that loaded it, whose threads a fork leaves there",
                hint="load the model in the process that uses it",
            )
        if self._loaded is None:
            raise ConfigError("this LLM is closed", hint="make a new one")
        return self._loaded

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    @property
    def num_free_pages(self) -> int:
        """KV pages that no request and no cached prefix holds."""
        running = self.running
        with self._lock:
            self._cancel_abandoned()
            return running.pages.num_free

    def add(self, prompt: CheckedPrompt, reader: LogitReader | None = None) -> Entry:
        """Let a prompt's samples join; they run when somebody asks for their events."""
        params = prompt.params
        room = self.running.plan.context_tokens - len(prompt.ids)
        with self._lock:
            number = next(self._request_count)
            seed = params.seed if params.seed is not None else hash((self._seed, number))
            requests: list[Request] = []
            for index in range(params.n):
                requests.append(
                    Request(
                        prompt_ids=prompt.ids,
                        params=params,
                        max_tokens=min(params.max_tokens or room, room),
                        seed=seed,
                        leader=requests[0] if requests else None,
                        index=index,
                        reader=reader,
                    )
                )
            samples = [self._sample(request) for request in requests]
            for request, sample in zip(requests, samples, strict=True):
                self._samples[request.id] = sample
                self.running.engine.scheduler.add(request)
        return Entry(prompt, samples)

    def stream(self, entry: Entry) -> TokenStream:
        """The entry's events; whoever takes them drives everybody's steps."""
        return TokenStream(
            entry.samples, pump=self._pump, cancel=self._cancel, abandon=self._abandoned.append
        )

    def run(
        self, entries: list[Entry], on_progress: Callable[[int, int], None] | None = None
    ) -> list[RequestOutput]:
        """Drive steps until the entries are done; ``on_progress(done, total)`` counts them.

        Whatever ends it, none of their requests is left.
        """
        samples = [sample for entry in entries for sample in entry.samples]
        num_done = -1
        try:
            while not all(sample.is_done for sample in samples):
                self._pump()
                done = sum(all(s.is_done for s in entry.samples) for entry in entries)
                if on_progress is not None and done != num_done:
                    on_progress(done, len(entries))
                num_done = done
            raise_failure(samples)
        finally:
            self._cancel_all(samples)
        peak = self.running.peak_vram_bytes()
        return [_result(entry, peak) for entry in entries]

    def close(self) -> None:
        """Cancel everything and give back GPU memory, pinned memory and threads. Idempotent.

        A fork has none of them to give back.
        """
        if self._is_forked:
            return
        with self._lock:
            try:
                self._cancel_all(self._samples.values())
            finally:  # a device that fails in a step that ran ahead keeps no memory
                if self._loaded is not None:
                    resources, self._loaded = self._loaded.resources, None
                    resources.close()

    def _sample(self, request: Request) -> Sample:
        return Sample(
            request,
            self.running.files.tokenizer,
            cancel=self._cancel,
            peak_vram=self.running.peak_vram_bytes,
        )

    def _pump(self) -> None:
        """Run one step and hand its tokens to their samples; an error ends all of them."""
        with self._lock:
            self._cancel_abandoned()
            engine = self.running.engine
            try:
                if engine.scheduler.has_work:
                    for output in engine.step():
                        self._samples[output.request.id].push(output)
            except BaseException as error:
                with ExitStack() as ending:
                    for sample in self._samples.values():
                        ending.callback(engine.cancel, sample.request)
                        if isinstance(error, Exception):
                            sample.fail(error)
                raise
            finally:
                for sample in [s for s in self._samples.values() if s.request.is_finished]:
                    sample.close()
                    del self._samples[sample.request.id]

    def _cancel_abandoned(self) -> None:
        while self._abandoned:
            self._cancel(self._abandoned.popleft(), "cancelled")

    def _cancel_all(self, samples: Iterable[Sample]) -> None:
        """Each of them, also where the device fails as one ends."""
        with ExitStack() as ending:
            for sample in reversed(list(samples)):  # the first one entered is the last to leave
                ending.callback(self._cancel, sample.request, "cancelled")

    def _cancel(self, request: Request, reason: str) -> None:
        with self._lock:
            try:
                if self._loaded is not None:
                    self._loaded.engine.cancel(request, reason)
            finally:
                sample = self._samples.get(request.id)
                if sample is not None and reason == "cancelled":
                    sample.close()
                    del self._samples[request.id]


def _result(entry: Entry, peak_vram_bytes: int) -> RequestOutput:
    prompt, samples = entry
    first = samples[0].request
    return RequestOutput(
        prompt=prompt.text,
        prompt_token_ids=prompt.ids,
        outputs=[sample.completion() for sample in samples],
        prompt_logprobs=first.prompt_logprobs if first.params.prompt_logprobs is not None else None,
        stats=_total_stats([sample.request for sample in samples], peak_vram_bytes),
    )


def _total_stats(requests: list[Request], peak_vram_bytes: int) -> RunStats:
    """Everybody's tokens, decoded from the first token of all to the last."""
    first, last = min(r.first_token_s for r in requests), max(r.last_token_s for r in requests)
    return replace(
        requests[0].stats(peak_vram_bytes),
        decode_s=max(0.0, last - first),
        output_tokens=sum(r.num_outputs for r in requests),
        expert_tokens_gpu=sum(r.expert_tokens_gpu for r in requests),
        expert_tokens_cpu=sum(r.expert_tokens_cpu for r in requests),
    )

"""The Python API: text in, text out.

Three rings, each usable alone: ``Engine.step`` (token ids) inside ``LLM.stream`` (text and
statistics) inside ``LLM.generate`` (results).

Ordering: any number of threads may call. One lock is held for a whole step, and whenever a request
enters or leaves; a sample's events are made under it and may be taken without it. A stream that
the collector finds only appends to ``_abandoned``: its request is cancelled before the next step.
"""

import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, overload

from fiddler.config import BUILTIN, EngineConfig
from fiddler.engine.request import LogitReader, Request
from fiddler.errors import ConfigError, PromptError, TemplateError
from fiddler.loading import LoadedModel, Progress, load_model
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.outputs import RequestOutput, RunStats
from fiddler.prompts import Prompt, check_params, check_prompt, is_batch, one_each, token_ids
from fiddler.sampling_params import SamplingParams
from fiddler.stream import Sample, TokenStream, raise_failure
from fiddler.text.tokenizer import Tokenizer
from offload.hardware import Hardware
from offload.plan import Plan

Message = dict[str, Any]


class LLM:
    """A loaded model. Close it, or use it in a ``with`` block, to give back memory and threads.

    ``options`` are the fields of :class:`fiddler.config.EngineConfig`. Requests of several streams
    and calls run as one continuous batch; the object may be shared between threads.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = BUILTIN,
        *,
        on_progress: Progress | None = None,
        **options: Any,
    ) -> None:
        self.config = EngineConfig(model=_name(model), **options)
        self._loaded: LoadedModel | None = load_model(self.config, on_progress)
        self._files = self._loaded.files
        self._plan = self._loaded.plan
        self._hardware = self._loaded.hardware
        self._dtypes = self._loaded.dtypes
        self._samples: dict[int, Sample] = {}
        self._abandoned: deque[Request] = deque()  # appended to without the lock
        self._lock = threading.RLock()
        self._request_count = itertools.count()

    # --- what is loaded ---

    @property
    def model_name(self) -> str:
        """``ORG/NAME``, ``builtin``, a folder's name, or a shape's."""
        return self._files.name

    @property
    def revision(self) -> str | None:
        """The hub commit, if the model came from the hub."""
        return self._files.revision

    @property
    def model_config(self) -> ModelConfig:
        """Shapes and switches of the model."""
        return self._files.config

    @property
    def plan(self) -> Plan:
        """Where everything lives."""
        return self._plan

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises PromptError for a named shape, which has none."""
        if self._files.tokenizer is None:
            raise PromptError(
                f"{self.model_name} has no tokenizer", hint="give the prompt as token ids"
            )
        return self._files.tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can chat."""
        return self._files.chat_template is not None

    @property
    def hardware(self) -> Hardware:
        """The machine, as it was found when the model was planned."""
        return self._hardware

    @property
    def dtypes(self) -> Dtypes:
        """The number types in memory."""
        return self._dtypes

    @property
    def num_free_pages(self) -> int:
        """KV pages that no request and no cached prefix holds."""
        with self._lock:
            self._cancel_abandoned()
            return self._running.pages.num_free

    def default_params(self) -> SamplingParams:
        """The settings in force when none are given: the model's own, then the house's."""
        return SamplingParams().with_defaults(self._files.generation_config)

    def expert_counts(self) -> list[list[int]]:
        """How often each expert was chosen since loading, ``[layers][experts]``."""
        counts: list[list[int]] = self._running.experts.counts_LE.tolist()
        return counts

    # --- generation ---

    @overload
    def generate(self, prompts: Prompt, params: SamplingParams | None = None) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | list[str] | list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Complete one prompt or several; a prompt is a string or a list of token ids.

        Several prompts run as one batch and come back in order. ``params`` may be one for all or
        one each. ``on_progress(done, total)`` counts finished prompts. Raises PromptError for a
        prompt that is empty or longer than the context, before any of them runs.
        """
        many: list[Any] = prompts if is_batch(prompts) else [prompts]
        every = one_each(params, len(many))
        checked = [self._prepare(prompt, p) for prompt, p in zip(many, every, strict=True)]
        results = self._run([self._enqueue(*request) for request in checked], on_progress)
        return results if is_batch(prompts) else results[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> TokenStream:
        """Complete one prompt, event by event; closing the stream cancels it."""
        samples = self._enqueue(*self._prepare(prompt, params))[2]
        return TokenStream(
            samples, pump=self._pump, cancel=self._cancel, abandon=self._abandoned.append
        )

    def chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutput:
        """Answer a conversation: messages of ``role`` (system, user, assistant) and ``content``."""
        ids = self.apply_chat_template(messages, tools=tools, template_kwargs=template_kwargs)
        return self.generate([ids], params)[0]  # a list, for a template may write nothing

    def stream_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> TokenStream:
        """As :meth:`chat`, event by event."""
        ids = self.apply_chat_template(messages, tools=tools, template_kwargs=template_kwargs)
        return self.stream(ids, params)

    def read_logits(self, prompts: list[list[int]], readers: Sequence[LogitReader]) -> None:
        """Compute prompts as one batch and show the predictions of each to its reader.

        This is for who asks about every token of the vocabulary: ``prompt_logprobs`` tells of a
        few. Raises PromptError as :meth:`generate` does; what a reader raises ends the batch.
        """
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        checked = [self._prepare(ids, greedy) for ids in prompts]
        pairs = zip(checked, readers, strict=True)
        self._run([self._enqueue(*request, reader) for request, reader in pairs], None)

    def apply_chat_template(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the prompt's token ids, with the beginning of the assistant's turn."""
        template = self._files.chat_template
        if template is None:
            raise TemplateError(
                f"{self.model_name} has no chat template",
                hint="use generate() with a plain prompt, or an instruction-tuned model",
            )
        text = template.render(messages, tools=tools, **(template_kwargs or {}))
        return self.tokenizer.encode(text, add_special_tokens=False)

    # --- lifetime ---

    def close(self) -> None:
        """Cancel everything and give back GPU memory, pinned memory and threads. Idempotent."""
        with self._lock:
            for sample in list(self._samples.values()):
                self._cancel(sample.request, "cancelled")
            if self._loaded is not None:
                resources, self._loaded = self._loaded.resources, None
                resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _running(self) -> LoadedModel:
        if self._loaded is None:
            raise ConfigError("this LLM is closed", hint="make a new one")
        return self._loaded

    # --- requests ---

    def _prepare(
        self, prompt: Prompt, params: SamplingParams | None
    ) -> tuple[str | None, list[int], SamplingParams]:
        """Check one prompt and complete its settings; nothing is queued yet."""
        vocab_size = self.model_config.vocab_size
        check_params(params, vocab_size=vocab_size)
        params = (params or SamplingParams()).with_defaults(self._files.generation_config)
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else token_ids(prompt)
        check_prompt(ids, context_tokens=self.plan.context_tokens, vocab_size=vocab_size)
        if params.stop:
            self.tokenizer  # noqa: B018  stop strings need text: refuse now, not at the first token
        return text, ids, params

    def _enqueue(
        self,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        reader: LogitReader | None = None,
    ) -> tuple[str | None, list[int], list[Sample]]:
        room = self.plan.context_tokens - len(ids)
        with self._lock:
            number = next(self._request_count)
            seed = params.seed if params.seed is not None else hash((self.config.seed, number))
            requests: list[Request] = []
            for index in range(params.n):
                requests.append(
                    Request(
                        prompt_ids=ids,
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
                self._running.engine.scheduler.add(request)
        return text, ids, samples

    def _sample(self, request: Request) -> Sample:
        return Sample(
            request,
            self._files.tokenizer,
            cancel=self._cancel,
            peak_vram=self._running.peak_vram_bytes,
        )

    def _pump(self) -> None:
        """Run one step and hand its tokens to their samples; an error ends all of them."""
        with self._lock:
            self._cancel_abandoned()
            engine = self._running.engine
            try:
                if engine.scheduler.has_work:
                    for output in engine.step():
                        self._samples[output.request.id].push(output)
            except BaseException as error:
                for sample in self._samples.values():
                    engine.cancel(sample.request)
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

    def _cancel(self, request: Request, reason: str) -> None:
        with self._lock:
            if self._loaded is not None:
                self._loaded.engine.cancel(request, reason)
            sample = self._samples.get(request.id)
            if sample is not None and reason == "cancelled":
                sample.close()
                del self._samples[request.id]

    def _run(
        self,
        prompts: list[tuple[str | None, list[int], list[Sample]]],
        on_progress: Callable[[int, int], None] | None,
    ) -> list[RequestOutput]:
        samples = [sample for _, _, group in prompts for sample in group]
        num_done = -1
        try:
            while not all(sample.is_done for sample in samples):
                self._pump()
                done = sum(all(s.is_done for s in group) for _, _, group in prompts)
                if on_progress is not None and done != num_done:
                    on_progress(done, len(prompts))
                num_done = done
            raise_failure(samples)
        finally:
            for sample in samples:
                self._cancel(sample.request, "cancelled")
        peak = self._running.peak_vram_bytes()
        return [_result(*prompt, peak) for prompt in prompts]


def _result(
    text: str | None, ids: list[int], samples: list[Sample], peak_vram_bytes: int
) -> RequestOutput:
    first = samples[0].request
    return RequestOutput(
        prompt=text,
        prompt_token_ids=ids,
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


def _name(model: str | os.PathLike[str]) -> str:
    return os.fspath(model) if isinstance(model, os.PathLike) else model

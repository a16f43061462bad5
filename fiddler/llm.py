"""The Python API: text in, text out.

Three rings, each usable alone: ``Engine.step`` (token ids) inside ``LLM.stream`` (text and
statistics) inside ``LLM.generate`` (results). Any number of threads may call: see
:mod:`fiddler.batch`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, overload

from fiddler.arguments import checked_arguments
from fiddler.batch import Batch
from fiddler.checked_prompt import checked_prompt
from fiddler.config import BUILTIN, EngineConfig
from fiddler.engine.request import LogitReader
from fiddler.errors import TemplateError
from fiddler.loading import LoadedModel, Progress, load_model
from fiddler.models.config import ModelConfig
from fiddler.models.dtypes import Dtypes
from fiddler.outputs import RequestOutput
from fiddler.progress import Count, request_bar
from fiddler.prompts import Prompt, Prompts, is_batch, is_batch_of_chats, named, one_each
from fiddler.sampling_params import SamplingParams
from fiddler.stream import TokenStream
from fiddler.text.tokenizer import Tokenizer
from offload.hardware import Hardware
from offload.plan import Plan

Message = dict[str, Any]


class LLM:
    """A loaded model. Close it, or use it in a ``with`` block, to give back memory and threads.

    ``options`` are the fields of :class:`fiddler.config.EngineConfig`, such as ``vram_gb``,
    ``dtype`` and ``max_model_len``. Requests of several streams and calls run as one continuous
    batch; the object may be shared between threads.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = BUILTIN,
        *,
        on_progress: Progress | None = None,
        **options: Any,
    ) -> None:
        name = os.fspath(model) if isinstance(model, os.PathLike) else model
        self.config = EngineConfig(model=name, **options)
        loaded = load_model(self.config, on_progress)
        self._files = loaded.files
        self._plan = loaded.plan
        self._hardware = loaded.hardware
        self._dtypes = loaded.dtypes
        self._batch = Batch(loaded, self.config.seed)

    def __repr__(self) -> str:
        plan = self._plan
        on_gpu = f"{plan.placement.num_resident:,} experts on the GPU side"
        return f"<LLM {self.model_name}: {self._dtypes}; {on_gpu}, context {plan.context_tokens:,}>"

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
        return self._files.needed_tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """``tokenizer``, by vLLM's name; it encodes and decodes, templates are applied here."""
        return self.tokenizer

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
        return self._batch.num_free_pages

    def default_params(self) -> SamplingParams:
        """The settings in force when none are given: the model's own, then the house's."""
        return SamplingParams().with_defaults(self._files.generation_config)

    def expert_counts(self) -> list[list[int]]:
        """How often each expert was chosen since loading, ``[layers][experts]``."""
        counts: list[list[int]] = self._running.experts.counts_LE.tolist()
        return counts

    # --- generation ---

    @overload
    def generate(
        self,
        prompts: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_progress: Count | None = None,
    ) -> list[RequestOutput]: ...

    @checked_arguments
    def generate(
        self,
        prompts: Prompt | Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_progress: Count | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Complete one prompt, which gives one result, or a list of them, which gives a list.

        vLLM gives a list in either case. A prompt is a string, a list of token ids, or a dict of
        ``prompt`` or ``prompt_token_ids``. Several run as one batch and come back in order.
        ``sampling_params`` may be one for all or one each. ``on_progress(done, total)`` counts
        finished prompts, and so does a bar with ``use_tqdm``, on standard error if that is a
        terminal (vLLM draws it unasked). Raises PromptError for a prompt that is empty or longer
        than the context, before any of them runs.
        """
        is_many = is_batch(prompts)
        bar = request_bar(use_tqdm, on_progress)
        return self._run("prompts", prompts, is_many, sampling_params, bar)

    @checked_arguments
    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> TokenStream:
        """Complete one prompt, event by event; closing the stream cancels it."""
        checked = checked_prompt(prompt, sampling_params, self._running)
        return self._batch.stream(self._batch.add(checked))

    @overload
    def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]: ...

    @checked_arguments
    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation: messages of ``role`` (system, user, assistant) and ``content``.

        A list of conversations gives a list of results, and ``use_tqdm`` draws a bar, as with
        :meth:`generate`.
        """
        kwargs: dict[str, Any] = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        to_prompt = functools.partial(self.apply_chat_template, **kwargs)
        is_many = is_batch_of_chats(messages)
        bar = request_bar(use_tqdm)
        return self._run("messages", messages, is_many, sampling_params, bar, to_prompt)

    @checked_arguments
    def stream_chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> TokenStream:
        """As :meth:`chat`, event by event."""
        ids = self.apply_chat_template(
            messages, tools=tools, chat_template_kwargs=chat_template_kwargs
        )
        return self.stream(ids, sampling_params)

    def read_logits(self, prompts: list[list[int]], readers: Sequence[LogitReader]) -> None:
        """Compute prompts as one batch and show the predictions of each to its reader.

        This is for who asks about every token of the vocabulary: ``prompt_logprobs`` tells of a
        few. Raises PromptError as :meth:`generate` does; what a reader raises ends the batch.
        """
        greedy = SamplingParams(max_tokens=1, temperature=0.0)
        checked = [checked_prompt(ids, greedy, self._running) for ids in prompts]
        pairs = zip(checked, readers, strict=True)
        self._batch.run([self._batch.add(prompt, reader) for prompt, reader in pairs])

    def apply_chat_template(
        self,
        messages: list[Message],
        *,
        tools: list[Any] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Return the prompt's token ids, with the beginning of the assistant's turn."""
        template = self._files.chat_template
        if template is None:
            raise TemplateError(
                f"{self.model_name} has no chat template",
                hint="use generate() with a plain prompt, or an instruction-tuned model",
            )
        text = template.render(messages, tools=tools, **(chat_template_kwargs or {}))
        return self.tokenizer.encode(text, add_special_tokens=False)

    # --- lifetime ---

    def close(self) -> None:
        """Cancel everything and give back GPU memory, pinned memory and threads. Idempotent."""
        self._batch.close()

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
        return self._batch.running

    def _run(
        self,
        name: str,
        asked: Any,
        is_many: bool,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        bar: contextlib.AbstractContextManager[Count],
        to_prompt: Callable[[Any], Prompt] = lambda prompt: prompt,
    ) -> RequestOutput | list[RequestOutput]:
        """Run what was asked as one batch; an error says which of many, elements of ``name``."""
        many = asked if is_many else [asked]
        checked, running = [], self._running
        for index, params in enumerate(one_each(sampling_params, len(many))):
            with named(f"{name}[{index}]") if is_many else contextlib.nullcontext():
                checked.append(checked_prompt(to_prompt(many[index]), params, running))
        with bar as tell:
            results = self._batch.run([self._batch.add(prompt) for prompt in checked], tell)
        return results if is_many else results[0]

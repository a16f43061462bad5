"""The one place where a command gets its model."""

import gc
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from fiddler.cli.calibrated import renew_calibration
from fiddler.config import EngineConfig
from fiddler.errors import PromptError, TemplateError
from fiddler.progress import progress_bars

if TYPE_CHECKING:
    from fiddler.models.config import ModelConfig
    from fiddler.models.dtypes import Dtypes
    from fiddler.outputs import TokenEvent
    from fiddler.sampling_params import SamplingParams
    from offload.hardware import Hardware
    from offload.plan import Plan

Messages = list[dict[str, Any]]


class Stream(Protocol):
    """Events of one answer. After ``close`` only what is already known still comes."""

    def __iter__(self) -> Iterator["TokenEvent"]: ...
    def close(self) -> None: ...


class ChatModel(Protocol):
    """What the commands use of :class:`fiddler.llm.LLM`."""

    @property
    def model_name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def config(self) -> EngineConfig: ...
    @property
    def has_chat_template(self) -> bool: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def model_config(self) -> "ModelConfig": ...
    @property
    def dtypes(self) -> "Dtypes": ...
    @property
    def hardware(self) -> "Hardware": ...
    @property
    def plan(self) -> "Plan": ...

    def default_params(self) -> "SamplingParams": ...
    def expert_counts(self) -> list[list[int]]: ...
    def stream(self, prompt: str, sampling_params: "SamplingParams | None" = None) -> Stream: ...
    def stream_chat(
        self,
        messages: Messages,
        sampling_params: "SamplingParams | None" = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Stream: ...
    def apply_chat_template(
        self, messages: Messages, *, chat_template_kwargs: dict[str, Any] | None = None
    ) -> list[int]: ...
    def close(self) -> None: ...


def open_llm(*, must_chat: bool = False, **options: Any) -> ChatModel:
    """Load the model that ``options`` (of :class:`fiddler.config.EngineConfig`) ask for.

    ``must_chat``: raise TemplateError for one that only continues text, before its weights are
    fetched. Progress is shown on standard error if that is a terminal.
    """
    from fiddler.llm import LLM

    settings = EngineConfig(**options)
    with progress_bars() as on_progress:
        if settings.load_format == "dummy":
            _require_tokenizer(settings)
        if must_chat:
            _require_chat_template(settings)
        if settings.device != "cpu":
            renew_calibration(only_with_gpu=True)  # without one, no plan depends on it
        llm = LLM(**options, on_progress=on_progress)
    gc.freeze()  # a full collection takes 0.2 s of 280,000 objects, for which a token would wait
    return llm


def _require_tokenizer(settings: EngineConfig) -> None:
    """Refuse a bare shape before gigabytes of seeded weights are made for it."""
    from fiddler.loading import find_model

    files = find_model(settings)
    if files.tokenizer is None:
        raise PromptError(
            f"{files.name} has no tokenizer, so it reads no text",
            hint="take a model that has a tokenizer.json; fiddler plan needs none",
        )


def _require_chat_template(settings: EngineConfig) -> None:
    from fiddler.hub import fetch_metadata
    from fiddler.text.chat_template import ChatTemplate

    folder = fetch_metadata(
        settings.model,
        revision=settings.revision,
        token=settings.token,
        offline=settings.offline,
    ).folder
    if ChatTemplate.from_folder(folder.path) is None:
        model = shlex.quote(settings.model)  # as the user called it: the hint works with that
        raise TemplateError(
            f"{folder.name} has no chat template, so it cannot chat",
            hint=f"fiddler generate -m {model} --raw PROMPT continues a text with it",
        )


def opens_reasoning(
    llm: ChatModel, messages: Messages, chat_template_kwargs: dict[str, Any]
) -> bool:
    """Whether the prompt of ``messages`` already holds the tag that begins reasoning."""
    from fiddler.text.reasoning import prompt_opens_reasoning

    ids = llm.apply_chat_template(messages, chat_template_kwargs=chat_template_kwargs)
    return prompt_opens_reasoning(llm.tokenizer.decode(ids[-16:], skip_special_tokens=False))

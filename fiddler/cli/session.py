"""The one place where a command gets its model."""

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from fiddler.cli.progress import progress_bars
from fiddler.config import EngineConfig
from fiddler.errors import PromptError, TemplateError

if TYPE_CHECKING:
    from fiddler.models.config import ModelConfig
    from fiddler.outputs import TokenEvent
    from fiddler.sampling_params import SamplingParams
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
    def has_chat_template(self) -> bool: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def model_config(self) -> "ModelConfig": ...
    @property
    def plan(self) -> "Plan": ...

    def default_params(self) -> "SamplingParams": ...
    def expert_counts(self) -> list[list[int]]: ...
    def stream(self, prompt: str, params: "SamplingParams | None" = None) -> Stream: ...
    def stream_chat(
        self,
        messages: Messages,
        params: "SamplingParams | None" = None,
        *,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Stream: ...
    def apply_chat_template(
        self, messages: Messages, *, template_kwargs: dict[str, Any] | None = None
    ) -> list[int]: ...
    def close(self) -> None: ...


def open_llm(**options: Any) -> ChatModel:
    """Load the model that ``options`` (of :class:`fiddler.config.EngineConfig`) ask for.

    Progress is shown on standard error if that is a terminal.
    """
    from fiddler.llm import LLM

    with progress_bars() as on_progress:
        if options.get("load_format") == "dummy":
            _require_tokenizer(EngineConfig(**options))
        return LLM(**options, on_progress=on_progress)


def _require_tokenizer(settings: EngineConfig) -> None:
    """Refuse a bare shape before gigabytes of seeded weights are made for it."""
    from fiddler.loading import find_model

    files = find_model(settings)
    if files.tokenizer is None:
        raise PromptError(
            f"{files.name} has no tokenizer, so it reads no text",
            hint="take a model that has a tokenizer.json; fiddler plan needs none",
        )


def require_chat_template(llm: ChatModel, model: str) -> None:
    """Raise :class:`fiddler.errors.TemplateError` for a model that only continues text.

    ``model`` is what the user called it: the hint is a command that works with that.
    """
    if not llm.has_chat_template:
        raise TemplateError(
            f"{llm.model_name} has no chat template, so it cannot chat",
            hint=f"fiddler generate -m {shlex.quote(model)} --raw PROMPT continues a text with it",
        )


def opens_reasoning(llm: ChatModel, messages: Messages, template_kwargs: dict[str, Any]) -> bool:
    """Whether the prompt of ``messages`` already holds the tag that begins reasoning."""
    from fiddler.text.reasoning import prompt_opens_reasoning

    ids = llm.apply_chat_template(messages, template_kwargs=template_kwargs)
    return prompt_opens_reasoning(llm.tokenizer.decode(ids[-16:], skip_special_tokens=False))

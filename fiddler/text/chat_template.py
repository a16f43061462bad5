"""Messages to a prompt, by the chat template that came with the model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fiddler.errors import CheckpointError, PromptError, TemplateError
from fiddler.text.messages import as_templates_want, check_conversation
from fiddler.text.model_files import read_json_object, read_text, special_tokens

if TYPE_CHECKING:
    import jinja2

TIME_LIMIT_S = 5.0  # of CPU; a chat of 1,000 messages renders in about 0.02 s
MAX_PROMPT_CHARS = 50_000_000  # ten times a prompt of a million tokens


class ChatTemplate:
    """One model's chat templates, rendered in a sandbox.

    ``templates`` are sources by name: ``tool_use`` is taken if there are tools, else ``default``.
    ``special_tokens`` such as ``bos_token`` are variables of the template.
    """

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Self | None:
        """Return the templates of a model folder, or None if it has none.

        ``chat_template.jinja`` and ``additional_chat_templates/*.jinja`` win over the
        ``chat_template`` of ``tokenizer_config.json``, which is a text or a list of named ones.
        """
        folder = Path(path)
        templates = _jinja_files(folder) or _configured(folder / "tokenizer_config.json")
        return cls(templates, special_tokens(folder)) if templates else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt; ``kwargs`` such as ``enable_thinking`` are variables of the template.

        Raises :class:`PromptError` for messages that are none, no plain JSON data or without role
        and content, and :class:`TemplateError` if the template refuses them, fails, or tries to
        leave its sandbox.
        """
        check_conversation(messages)
        variables = {
            "documents": None,
            **self._special_tokens,
            **_plain_data("template argument", kwargs),
            "messages": as_templates_want(_plain_data("message", list(messages))),
            "tools": _plain_data("tool", None if tools is None else list(tools)),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._run(self._choose(has_tools=tools is not None), variables)

    def _choose(self, *, has_tools: bool) -> str:
        if has_tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" in self._templates:
            return "default"
        raise TemplateError(
            f"the model has several chat templates ({', '.join(sorted(self._templates))}) "
            "and none is its default"
        )

    def _run(self, name: str, variables: dict[str, Any]) -> str:
        from fiddler.text.sandbox import time_limit

        try:
            with time_limit(TIME_LIMIT_S):
                return _join_bounded(self._compile(name).generate(**variables))
        except Exception as error:  # a template is foreign code and can raise anything
            raise _explain(error) from error

    def _compile(self, name: str) -> "jinja2.Template":
        from fiddler.text.sandbox import make_environment

        if name not in self._compiled:
            self._compiled[name] = make_environment().from_string(self._templates[name])
        return self._compiled[name]


def _jinja_files(folder: Path) -> dict[str, str]:
    files = {p.stem: p for p in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    default = folder / "chat_template.jinja"
    if default.is_file():
        files["default"] = default
    return {name: read_text(path) for name, path in files.items()}


def _configured(path: Path) -> dict[str, str]:
    value = read_json_object(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for text in named.values()):
        raise CheckpointError(
            f"chat_template in {path} is neither a text nor a list of named texts",
            hint="put the template into a file chat_template.jinja beside it",
        )
    return named


def _plain_data(what: str, value: Any) -> Any:
    """Copy ``value`` into plain dicts, lists, texts and numbers; only such enter the sandbox."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"a {what} is not plain JSON data: {error}") from error


def _join_bounded(pieces: Iterable[str]) -> str:
    from fiddler.text.sandbox import LimitError

    texts: list[str] = []
    num_chars = 0
    for piece in pieces:
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise LimitError(f"it wrote more than {MAX_PROMPT_CHARS:,} characters")
        texts.append(piece)
    return "".join(texts)


def _explain(error: Exception) -> TemplateError:
    """The user's version of what came out of a template."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    from fiddler.text.sandbox import LimitError, RefusedError

    reason = str(error) or type(error).__name__
    match error:
        case RefusedError():
            return TemplateError(f"the chat template refuses this conversation: {reason}")
        case SecurityError():
            return TemplateError(
                f"the chat template tried to leave its sandbox: {reason}",
                hint="no harmless template does that; look at it before you use this model",
            )
        case LimitError():
            return TemplateError(f"the chat template was stopped: {reason}")
        case TemplateSyntaxError():
            return TemplateError(
                f"the chat template is wrong in line {error.lineno}: {reason}",
                hint="mend or replace chat_template.jinja, or chat_template in"
                " tokenizer_config.json, in the model's folder",
            )
        case _:
            return TemplateError(
                f"the chat template failed: {reason}",
                hint="check that the messages and tools have the fields it expects",
            )

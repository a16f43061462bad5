"""What templates are given as messages: checked, with texts for OpenAI's lists of parts."""

from collections.abc import Sequence
from typing import Any

from fiddler.errors import PromptError, nearest

# By any of these an assistant says something without content.
_CALLS = ("tool_calls", "function_call")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_EXAMPLE = 'for example {"role": "user", "content": "hello"}'


def check_conversation(messages: object) -> None:
    """PromptError for what is no list of messages; each is looked at by as_templates_want."""
    if isinstance(messages, (str, dict)):
        raise PromptError(
            f"a conversation is a list of messages, not {messages!r}",
            hint='for example [{"role": "user", "content": "hello"}]; generate() takes a text',
        )
    if not messages:
        raise PromptError("the conversation has no messages")


def as_templates_want(messages: Sequence[object]) -> list[dict[str, Any]]:
    """Copy messages without the keys that have no value, and with reasoning by all its names.

    Keys beside role and content stay, for templates read what they like: name, tool_calls,
    tool_call_id. PromptError for a message that would leave something out of the prompt.
    """
    return [_message(message, f"message {i}") for i, message in enumerate(messages, 1)]


def _message(message: object, what: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise PromptError(
            f"a message must be a dict with role and content, not {message!r}", hint=_EXAMPLE
        )
    given = {key: value for key, value in message.items() if value is not None}
    if not isinstance(_required(given, "role", what), str):
        raise PromptError(f"the role of {what} must be a text, not {given['role']!r}")
    is_call = given["role"] == "assistant" and any(given.get(key) for key in _CALLS)
    if "content" in given or not is_call:
        given["content"] = _text(_required(given, "content", what), what)
    reasoning = next((given[key] for key in _REASONING_KEYS if key in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}


def _required(message: dict[str, Any], key: str, what: str) -> Any:
    if key in message:
        return message[key]
    like = next((name for name in message if nearest(name, [key])), None)
    hint = f"{like!r} in it should be {key!r}" if like else _EXAMPLE
    raise PromptError(f"{what} has no {key}", hint=hint)


def _text(content: object, what: str) -> str:
    """Content as one text; parts are lines of it, as in vLLM."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PromptError(
            f"the content of {what} must be a text or a list of text parts, not {content!r}"
        )
    return "\n".join(_part(part, what) for part in content)


def _part(part: object, what: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is not None and kind != "text":
        raise PromptError(
            f"{what} has a part of type {kind!r}, but models here read only text",
            hint="leave it out, or say it in words",
        )
    text = part.get("text") if isinstance(part, dict) else None
    if kind is None or not isinstance(text, str):
        raise PromptError(
            f"{what} has a part that is no text: {part!r}",
            hint='a part is {"type": "text", "text": "hello"}',
        )
    return text

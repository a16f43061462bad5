"""What may be asked of a model: prompts and settings, checked before anything is queued."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard

from fiddler.errors import ConfigError, FiddlerError, PromptError, nearest
from fiddler.sampling_params import SamplingParams
from offload.units import counted

Prompt = str | list[int] | dict[str, Any]  # a dict: prompt or prompt_token_ids, or both
Prompts = list[str] | list[list[int]] | list[dict[str, Any]] | list[Prompt]

_KEYS = ("prompt", "prompt_token_ids")


def is_batch(prompts: object) -> TypeGuard[list[Any]]:
    """Whether these are several prompts; a list of numbers is one prompt of token ids."""
    return isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))


def is_batch_of_chats(messages: object) -> TypeGuard[list[list[dict[str, Any]]]]:
    """Whether these are several conversations; a list of dicts is one."""
    return isinstance(messages, list) and bool(messages) and isinstance(messages[0], list)


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Begin the sentence of an error with which of several prompts it is about."""
    try:
        yield
    except FiddlerError as error:
        raise type(error)(f"{what}: {error.message}", hint=error.hint) from error


def one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams | None]:
    """Return ``count`` parameters: the same for all, or those of a list of that length."""
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, list | tuple):
        raise _not_settings(params)
    if len(params) != count:
        raise ConfigError(f"{count} prompts came with {len(params)} sampling parameters")
    return params


def _not_settings(given: object) -> ConfigError:
    return ConfigError(
        f"sampling_params must be SamplingParams, not {type(given).__name__}",
        hint="the prompt comes first, then SamplingParams(max_tokens=64)",
    )


def text_and_ids(prompt: object) -> tuple[str | None, list[int] | None]:
    """Return what a prompt gives of the two, at least one; PromptError if it is none."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, dict):
        return None, _token_ids(prompt)
    if "role" in prompt:
        raise _is_a_chat()
    for key in prompt:
        if key not in _KEYS:
            raise PromptError(
                f"a prompt has no key {key!r}{nearest(str(key), _KEYS)}",
                hint=f"its keys are {' and '.join(_KEYS)}",
            )
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if ids is None and not isinstance(text, str):
        raise PromptError(f"the prompt of a dict is a text, not {type(text).__name__}")
    return text, None if ids is None else _token_ids(ids)


def _is_a_chat() -> PromptError:
    return PromptError(
        "messages are a conversation, not a prompt",
        hint="give them to chat(), or to stream_chat() for one token after the other",
    )


def _token_ids(prompt: object) -> list[int]:
    """Return a copy of a prompt of token ids; PromptError for anything else."""
    if isinstance(prompt, list) and any(isinstance(m, dict) and "role" in m for m in prompt):
        raise _is_a_chat()
    if not isinstance(prompt, list) or not all(isinstance(token, int) for token in prompt):
        raise PromptError(
            f"a prompt is a text or a list of token ids, not {type(prompt).__name__}",
            hint="an array becomes a list of numbers by its tolist()",
        )
    return list(prompt)


def check_prompt(
    ids: list[int], *, context_tokens: int, max_position: int, vocab_size: int
) -> None:
    """Raise PromptError unless the ids are of the model and leave room for an answer."""
    if not ids:
        raise PromptError("the prompt is empty", hint="give at least one token of text")
    if len(ids) >= context_tokens:
        larger = ", or load the model with a larger context (--context, max_model_len)"
        end = larger if context_tokens < max_position else ": the model has no more context"
        raise PromptError(
            f"the prompt has {counted(len(ids), 'token')}, but the context holds "
            f"{context_tokens:,} and the answer needs at least one",
            hint=f"shorten it{end}",
        )
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise PromptError(f"token ids must lie between 0 and {vocab_size - 1}")


def check_params(params: object, *, vocab_size: int) -> None:
    """Raise ConfigError unless these are parameters that name tokens of the model only."""
    if params is None:
        return
    if not isinstance(params, SamplingParams):
        raise _not_settings(params)
    ids_of = {"logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
    for name, ids in ids_of.items():
        if ids and max(ids) >= vocab_size:
            raise ConfigError(
                f"{name} names token {max(ids)}, but the vocabulary ends at {vocab_size - 1}"
            )

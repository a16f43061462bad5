"""``/set name=value`` or ``name value``: text to sampling parameters, by each field's own type."""

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_type_hints

from fiddler.errors import ConfigError, reject_unknown
from fiddler.sampling_params import SamplingParams

# Results that a chat has no place to show.
NOT_IN_CHAT = {"n", "logprobs", "prompt_logprobs", "routed_experts"}
SETTABLE = tuple(f.name for f in fields(SamplingParams) if f.name not in NOT_IN_CHAT)
RESET = "default"
_ASSIGNMENT = re.compile(r"\s*([^\s=]+)\s*(?:=|\s)(.*)", re.DOTALL)


def edit_params(params: SamplingParams, text: str, defaults: SamplingParams) -> SamplingParams:
    """Return ``params`` with ``name=value`` applied; the value ``default`` takes ``defaults``' own.

    Raises :class:`ConfigError` for a missing value, an unknown name or a value that does not fit.
    """
    name, value = assignment(text)
    reject_unknown("parameter", [name], SETTABLE)
    parsed = getattr(defaults, name) if value == RESET else _parse(name, value)
    return replace(params, **{name: parsed})


def assignment(text: str) -> tuple[str, str]:
    """Name and value of ``name=value`` or ``name value``."""
    match = _ASSIGNMENT.fullmatch(text)
    if match is None:
        raise ConfigError("say what to set as name=value", hint="for example /set temperature=0.7")
    return match[1], match[2].strip()


def params_to_json(params: SamplingParams) -> dict[str, Any]:
    """The parameters a chat may set, as JSON values."""
    return {name: getattr(params, name) for name in SETTABLE}


def params_from_json(record: dict[str, Any]) -> dict[str, Any]:
    """Checked fields out of :func:`params_to_json`'s record, read back from JSON.

    Raises :class:`ConfigError` for an unknown name or a value that does not fit.
    """
    reject_unknown("parameter", record, SETTABLE)
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in record.items()}
    values = {name: _parse(name, text) for name, text in texts.items()}
    SamplingParams(**values)
    return values


def _parse(name: str, text: str) -> Any:
    """``text`` as the type of the field ``name``; ``none`` or ``null`` where it may be None."""
    hint = str(get_type_hints(SamplingParams)[name])
    if text.lower() in ("none", "null") and "None" in hint:
        return None
    for key, (parse, expected) in PARSERS.items():
        if key in hint:
            try:
                return parse(text)
            except ValueError as error:
                raise ConfigError(f"{name} must be {expected}, not {text!r}") from error
    raise AssertionError(f"no parser for {name}: {hint}")


def _boolean(text: str) -> bool:
    words = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _strings(text: str) -> tuple[str, ...]:
    """A JSON list of strings, or the text itself as the only one."""
    if not text.startswith("["):
        return (text,)
    values = json.loads(text)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(text)
    return tuple(values)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.strip("[]").replace(",", " ").split())


def _biases(text: str) -> dict[int, float]:
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(text)
    return {int(key): float(value) for key, value in record.items()}


# Looked up in this order, since "Sequence[int]" also contains "int".
PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "dict": (_biases, 'a JSON object such as {"42": -5}'),
    "Sequence[str": (_strings, 'a text or a JSON list such as ["a", "b"]'),
    "Sequence[int": (_integers, "whole numbers"),
    "bool": (_boolean, "on or off"),
    "int": (int, "a whole number"),
    "float": (float, "a number"),
}

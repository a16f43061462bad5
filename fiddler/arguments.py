"""Arguments that a method does not take: an error that says what it takes, or where they go."""

import functools
import inspect
import reprlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

from fiddler.errors import BY_OTHER_NAMES, ConfigError, nearest
from fiddler.sampling_params import SamplingParams

P = ParamSpec("P")
R = TypeVar("R")

_SETTINGS = tuple(f.name for f in fields(SamplingParams))


def checked_arguments(method: Callable[P, R]) -> Callable[P, R]:
    """Decorator: ConfigError in place of Python's TypeError for a call that cannot be.

    The signature stays the method's own, for editors and for ``inspect``.
    """
    signature = inspect.signature(method)
    valid = [name for name in signature.parameters if name != "self"]

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in kwargs.items():
            if name not in valid:
                raise _unknown(method.__name__, name, value, valid)
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{method.__name__}(): {error}", hint=_takes(valid)) from None
        return method(*args, **kwargs)

    return checked


def _unknown(method: str, name: str, value: Any, valid: list[str]) -> ConfigError:
    said = f"{method}() takes no {name!r}"
    if name in BY_OTHER_NAMES:
        return ConfigError(said, hint=BY_OTHER_NAMES[name])
    if close := nearest(name, valid):
        return ConfigError(f"{said}{close}", hint=_takes(valid))
    setting = name if name in _SETTINGS else next((s for s in _SETTINGS if nearest(name, [s])), "")
    if not setting:
        return ConfigError(said, hint=_takes(valid))
    where = f"sampling_params=SamplingParams({setting}={reprlib.repr(value)})"
    return ConfigError(f"{said}: settings go into SamplingParams", hint=f"give it {where}")


def _takes(valid: list[str]) -> str:
    return f"it takes {', '.join(valid)}"

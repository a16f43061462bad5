"""Types of options: sizes as people write them, and refusals in plain words."""

import re
from typing import Any

import click

from fiddler.dtype_names import DTYPES, check_dtype
from fiddler.errors import ConfigError

_GIB = re.compile(r"(.*\d\.?)\s*(?:g|gb|gib)", re.IGNORECASE)
_KIBI = re.compile(r"(\d+)\s*k", re.IGNORECASE)


class Whole(click.IntRange):
    """A whole number; click's own refusal speaks of an integer range."""

    name = "whole number"


class Number(click.FloatRange):
    """As :class:`Whole`, with a fraction."""

    name = "number"


class Gib(Number):
    """GiB: ``8``, or with a unit, ``8GiB``, ``8GB`` or ``8G``, all of which mean the same."""

    name = "number of GiB, as in 8 or 7.5"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _GIB.fullmatch(value.strip()) if isinstance(value, str) else None
        number: Any = found[1] if found else value
        return super().convert(number, param, ctx)


class Tokens(Whole):
    """Tokens: ``32768``, or ``32k``, which is as many."""

    name = "number of tokens, as in 32768 or 32k"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = _KIBI.fullmatch(value.strip()) if isinstance(value, str) else None
        number: Any = int(found[1]) * 1024 if found else value
        return super().convert(number, param, ctx)


class Dtype(click.Choice[str]):
    """A type of weights; what is none is refused as in ``LLM(...)``."""

    def __init__(self) -> None:
        super().__init__(DTYPES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            check_dtype(value)
        except ConfigError as error:
            self.fail(f"{error.message} {error.hint.capitalize()}.", param, ctx)
        return super().convert(value, param, ctx)

"""Types of options: sizes as people write them, and refusals in plain words."""

import difflib
import re
from typing import Any

import click

from fiddler.config import DTYPES

OF_BITS = {
    **{bits: tuple(f"w{bits}g{group}" for group in (128, 64, 32)) for bits in "48"},
    **{"16": ("bfloat16",), "32": ("float32",)},
}
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
    """A type of weights; one that there is not names the nearest, not all of them."""

    def __init__(self) -> None:
        super().__init__(DTYPES)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in DTYPES:
            return super().convert(value, param, ctx)
        near = " or ".join(map(repr, near_dtypes(str(value))))
        self.fail(
            f"{value!r} is no type of weights; did you mean {near}? There are auto, float32, "
            "bfloat16, and those of docs/packed-experts.md: w4 or w8, then g32, g64 or g128, then "
            "z for zero points, then -bf16 for such scales.",
            param,
            ctx,
        )


def near_dtypes(name: str) -> list[str]:
    """At most three: names that look alike, else those of as many bits, as q4_0 and int8 have."""
    alike = difflib.get_close_matches(name.lower(), DTYPES, n=3, cutoff=0.6)
    bits = re.search(r"4|8|16|32", name)
    return alike or list(OF_BITS[bits[0] if bits else "16"])

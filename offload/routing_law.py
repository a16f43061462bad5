"""By which law benchmarks draw experts, as it is written on a command line."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fiddler.errors import ConfigError, nearest

MODEL = "model"  # the router's own choice: no law
HINT = "valid: model, uniform, zipf:S (as zipf:1.2), sticky:P (as sticky:0.8), drift:N (drift:500)"
DRIFT_SKEW = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Each token draws distinct experts; by default all are equally likely.

    ``skew``: the expert of rank r has weight r ** -skew, ranks being shuffled in every layer.
    ``stay``: probability that an expert chosen for a token is kept for the next one. ``drift``:
    tokens after which all ranks are shuffled anew, as when the subject changes; 0: never.
    """

    skew: float = 0.0
    stay: float = 0.0
    drift: int = 0


@dataclass(frozen=True, slots=True)
class _Numbered:
    letter: str
    wanted: str
    is_valid: Callable[[float], bool]
    law: Callable[[float], Law]


_NUMBERED = {
    "zipf": _Numbered("S", "0 or more", lambda s: s >= 0, lambda s: Law(skew=s)),
    "sticky": _Numbered("P", "from 0 to 1", lambda p: 0 <= p <= 1, lambda p: Law(stay=p)),
    "drift": _Numbered(
        "N",
        "a whole number from 1",
        lambda n: n >= 1 and n == int(n),
        lambda n: Law(skew=DRIFT_SKEW, drift=int(n)),
    ),
}


def parse_law(text: str) -> Law | None:
    """The law that ``text`` names, None for ``model``; ConfigError offers the nearest form."""
    name, colon, number = text.partition(":")
    if text == MODEL:
        return None
    if text == "uniform":
        return Law()
    if name not in _NUMBERED:
        forms = [MODEL, "uniform"]
        forms += [f"{known}:{number or form.letter}" for known, form in _NUMBERED.items()]
        raise ConfigError(f"unknown routing {text!r}{nearest(text, forms)}", hint=HINT)
    form = _NUMBERED[name]
    value = _number(number) if colon else None
    if value is None or not form.is_valid(value):
        raise ConfigError(
            f"routing {text!r} is not of the form '{name}:{form.letter}' "
            f"with {form.letter} {form.wanted}",
            hint=HINT,
        )
    return form.law(value)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

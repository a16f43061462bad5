"""How one request is sampled, in vLLM's names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, NamedTuple, Self

from fiddler.errors import ConfigError, named_arguments


@named_arguments("sampling parameter")
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request.

    Applied in this order: ``logit_bias`` and penalties, ``min_tokens``, ``temperature``, ``top_k``,
    ``top_p``, ``min_p``, draw. ``temperature=0`` is greedy. Fields left at None are filled from the
    model's ``generation_config.json``, then from the house defaults (temperature 1, no filters).
    ``max_tokens=None`` means up to the end of the context.
    """

    n: int = 1
    max_tokens: int | None = 512
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None  # 0 or -1: off
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()  # one text, or several; kept as a tuple
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    routed_experts: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple(self.stop_token_ids))
        for name, limits in _LIMITS.items():
            limits.check(name, getattr(self, name))
        for name, value, is_valid, expected in _checks(self):
            if not is_valid:
                raise ConfigError(f"{name} must be {expected}, not {value!r}")

    def with_defaults(self, generation_config: dict[str, Any]) -> Self:
        """Return a copy with every None filled from the model's own settings, then ours."""
        model = dict(generation_config)
        if model.get("do_sample") is False:
            model["temperature"] = 0.0
        house = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        filled: dict[str, Any] = {
            name: model.get(name) if model.get(name) is not None else default
            for name, default in house.items()
            if getattr(self, name) is None
        }
        try:
            return replace(self, **filled)
        except ConfigError as error:
            raise ConfigError(
                f"in the model's generation_config.json, {error.message}",
                hint="set it yourself in SamplingParams, or mend the file",
            ) from error


class _Limits(NamedTuple):
    """What a number may be."""

    low: float
    high: float
    expected: str
    is_whole: bool = False
    may_be_none: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless ``value`` is a number within the limits (so not NaN)."""
        if value is None and self.may_be_none:
            return
        kind = Integral if self.is_whole else Real
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number:
            what = "a whole number" if self.is_whole else "a number"
            raise ConfigError(f"{name} must be {what}, not {value!r}")
        if not self.low <= value <= self.high:
            raise ConfigError(f"{name} must be {self.expected}, not {value!r}")


_INF = float("inf")
_LIMITS = {
    "n": _Limits(1, 1024, "between 1 and 1024", is_whole=True),
    "max_tokens": _Limits(1, _INF, "at least 1", is_whole=True, may_be_none=True),
    "min_tokens": _Limits(0, _INF, "at least 0", is_whole=True),
    "temperature": _Limits(0, 100, "between 0 and 100", may_be_none=True),
    "top_k": _Limits(-1, _INF, "-1, 0 or more", is_whole=True, may_be_none=True),
    "top_p": _Limits(1e-9, 1, "above 0 and at most 1", may_be_none=True),
    "min_p": _Limits(0, 1, "between 0 and 1"),
    "repetition_penalty": _Limits(1e-9, 1e9, "above 0 and finite", may_be_none=True),
    "presence_penalty": _Limits(-2, 2, "between -2 and 2"),
    "frequency_penalty": _Limits(-2, 2, "between -2 and 2"),
    "seed": _Limits(-_INF, _INF, "a whole number", is_whole=True, may_be_none=True),
    "logprobs": _Limits(0, 100, "between 0 and 100", is_whole=True, may_be_none=True),
    "prompt_logprobs": _Limits(0, 100, "between 0 and 100", is_whole=True, may_be_none=True),
}
_SWITCHES = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "routed_experts")


def _as_tuple(value: Any) -> Any:
    """A list as a tuple, one text as a tuple of it, None as none; the rest is checked later."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _checks(p: SamplingParams) -> list[tuple[str, Any, bool, str]]:
    bias = p.logit_bias
    return [
        ("stop", p.stop, _all(p.stop, lambda s: isinstance(s, str) and s), "non-empty strings"),
        ("stop_token_ids", p.stop_token_ids, _all(p.stop_token_ids, _is_id), "token ids"),
        (
            "logit_bias",
            bias,
            isinstance(bias, dict)
            and all(
                _is_id(k) and isinstance(v, Real) and -100 <= float(v) <= 100
                for k, v in bias.items()
            ),
            "numbers between -100 and 100 by token id",
        ),
        (
            "min_tokens",
            p.min_tokens,
            p.max_tokens is None or p.min_tokens <= p.max_tokens,
            f"at most max_tokens ({p.max_tokens})",
        ),
        *(
            (name, getattr(p, name), isinstance(getattr(p, name), bool), "True or False")
            for name in _SWITCHES
        ),
    ]


def _all(values: object, is_valid: Callable[[Any], Any]) -> bool:
    return isinstance(values, tuple) and all(map(is_valid, values))


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0

"""A jinja2 sandbox for chat templates, which are programs written by strangers.

It renders what ``transformers`` renders (same block trimming, loop controls, ``tojson``,
``raise_exception``, ``strftime_now``, ``generation`` blocks) and is stricter: a template may call
only what :func:`_is_plain_callable` lists, and its time and its numbers are bounded.
"""

import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace

MAX_NUMBER = 1_000_000  # as a width or as a number of repetitions
MAX_CHARS = 50_000_000  # of one text; ten times a prompt of a million tokens
MAX_POWER = 64
MAX_BITS = 4096  # of a product of two whole numbers

_PLAIN_TYPES = (str, int, float, bool, list, tuple, dict)
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})  # methods of str
_SIZED_FILTERS = ("batch", "center", "indent", "round", "slice", "truncate", "wordwrap")

_deadline: ContextVar[float] = ContextVar("deadline")


class RefusedError(jinja2.TemplateError):
    """What ``raise_exception`` raises: the template's own message to the user."""


class LimitError(jinja2.TemplateError):
    """The template ran too long or made something too large."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Bound the CPU time that loops and macros of a template may use on this thread."""
    token = _deadline.set(time.thread_time() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def make_environment() -> "ChatSandbox":
    """Return a fresh environment with everything a chat template may use, and nothing more.

    Templates render only within :func:`time_limit`.
    """
    sandbox = ChatSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    for name in _SIZED_FILTERS:
        sandbox.filters[name] = _with_checked_numbers(sandbox.filters[name])
    sandbox.filters["tojson"] = _to_json
    sandbox.globals = dict(_GLOBALS)
    return sandbox


class ChatSandbox(ImmutableSandboxedEnvironment):
    """Refuses, where the library's sandbox would return an undefined value that prints as ""."""

    intercepted_binops = frozenset({"*", "**"})

    def is_safe_callable(self, obj: Any) -> bool:
        """Whether a template may call ``obj``."""
        return super().is_safe_callable(obj) and (obj == self.tick or _is_plain_callable(obj))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """Refuse an attribute that the sandbox hides."""
        raise SecurityError(f"it reads {attribute!r} of a {type(obj).__name__}")

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``__obj`` for the template."""
        if getattr(__obj, "__name__", "") in _PADDING:
            _check_numbers((*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply or raise to a power, both of which make much out of little."""
        if operator == "**":
            _check_power(left, right)
        else:
            _check_product(left, right)
        return super().call_binop(context, operator, left, right)

    def tick(self) -> None:
        """Run at every turn of a loop and every call of a macro; ends a template that hangs."""
        if time.thread_time() > _deadline.get():
            raise LimitError("it ran for too long")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        blocks: Iterable[Any] = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        for block in list(blocks):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(tick, lineno=block.lineno))
        return tree


class _GenerationBlock(Extension):
    """``{% generation %}...{% endgeneration %}`` marks training targets; here it only scopes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _PublicNamespace(Namespace):
    """``namespace()`` without private names, and with a bound on what a loop can pile up in it."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, initial = args[0], dict(*args[1:], **attributes)
        Namespace.__init__(self)
        for name, value in initial.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"it stores the private name {name!r}")
        if isinstance(value, (str, list, tuple)) and len(value) > MAX_CHARS:
            raise LimitError(f"it stores more than {MAX_CHARS:,} characters in {name!r}")
        Namespace.__setitem__(self, name, value)


def _raise_exception(message: str) -> NoReturn:
    raise RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Python writes it: jinja's own ``tojson`` escapes for HTML."""
    _check_numbers((indent,))
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


_GLOBALS: dict[str, Callable[..., Any]] = {
    "range": safe_range,  # at most 100,000 numbers
    "dict": dict,
    "namespace": _PublicNamespace,
    "cycler": Cycler,
    "joiner": Joiner,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}


def _is_plain_callable(obj: Any) -> bool:
    """Whether ``obj`` is the template's own, one of our functions, or a method of plain data."""
    if isinstance(obj, (Macro, LoopContext, BlockReference, Joiner, Undefined)):
        return True
    if any(obj is function for function in _GLOBALS.values()):
        return True
    method = getattr(obj, "__wrapped__", obj)  # str.format comes wrapped by the library
    if isinstance(method, BuiltinMethodType):
        return type(method.__self__) in _PLAIN_TYPES
    return isinstance(method, MethodType) and type(method.__self__) in (LoopContext, Cycler)


def _with_checked_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_numbers((*args, *kwargs.values()))
        return function(value, *args, **kwargs)

    return checked


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise LimitError(f"it asks for a width of {value}")


def _check_power(base: Any, exponent: Any) -> None:
    if abs(exponent) > MAX_POWER or (isinstance(base, int) and abs(base) > MAX_NUMBER):
        raise LimitError(f"it computes a power larger than {MAX_NUMBER:,}**{MAX_POWER}")


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_BITS:
            raise LimitError(f"it computes a number of more than {MAX_BITS} bits")
        return
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, (str, list, tuple)) and len(repeated) * times > MAX_CHARS:
            raise LimitError(f"it repeats a text to more than {MAX_CHARS:,} characters")

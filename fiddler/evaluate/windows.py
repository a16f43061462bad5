"""Sliding windows over a text, each of its tokens scored once and with enough before it. Pure."""

from dataclasses import dataclass

from fiddler.errors import ConfigError, PromptError
from offload.units import counted


@dataclass(frozen=True, slots=True)
class Window:
    """A model reads the text's tokens from ``begin`` to ``end``; those from ``first`` on count."""

    begin: int
    first: int
    end: int


def check_sizes(window: int, stride: int) -> None:
    """Raise :class:`ConfigError` unless every window but the first has some context."""
    if window < 2:
        raise ConfigError(f"a window of {window} predicts nothing", hint="give --window 2 or more")
    if not 1 <= stride < window:
        raise ConfigError(
            f"the stride must be between 1 and {window - 1}, one below the window, not {stride}"
        )


def cut_windows(num_tokens: int, *, window: int, stride: int, num_start: int) -> list[Window]:
    """Cut a text of ``num_tokens`` into windows of ``window`` tokens, ``stride`` apart.

    ``num_start`` tokens, 0 or 1, stand before every window's own and are counted in its length.
    Each token is scored once, but a text's first one only if a start token comes before it. All
    but the first window's are scored with at least ``window - stride`` tokens before them; the last
    window reaches back for that. Raises :class:`PromptError` for a text shorter than one window.
    """
    check_sizes(window, stride)
    if num_tokens + num_start < window:
        raise PromptError(
            f"the text has {counted(num_tokens, 'token')}, less than one window of {window:,}",
            hint="give a longer text, or a smaller --window",
        )
    own = window - num_start
    windows = [Window(0, 1 - num_start, own)]
    while windows[-1].end < num_tokens:
        end = min(windows[-1].end + stride, num_tokens)
        windows.append(Window(end - own, windows[-1].end, end))
    return windows

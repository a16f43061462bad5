"""How an answer looks: plain text on a pipe, Markdown on a terminal."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from fiddler.cli.console import error_width, note, output_console, printable, styled
from fiddler.cli.markdown_blocks import BlockSplitter
from fiddler.cli.stats_line import folded, stats_line
from fiddler.outputs import RunStats

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from fiddler.cli.expected import Expected

REFRESH_S = 1 / 8
RENDER_SHARE = 20  # of the time at most 1/20 goes into drawing: the experts need the CPU


class AnswerView(Protocol):
    """Used in a ``with`` block around one answer."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def reasoning(self, text: str) -> None: ...
    def answer(self, text: str) -> None: ...


def answer_view(*, is_plain: bool, show_reasoning: bool) -> AnswerView:
    """Markdown if standard output is a terminal that can move its cursor, or else plain text."""
    if sys.stdout.isatty() and not is_plain:
        console = output_console()
        if not console.is_dumb_terminal:
            return MarkdownView(console, show_reasoning=show_reasoning)
    return PlainView(show_reasoning=show_reasoning)


class SilentView:
    """Shows nothing; for answers that are printed as a whole."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def reasoning(self, text: str) -> None: ...
    def answer(self, text: str) -> None: ...


class PlainView:
    """Answer on standard output, reasoning on standard error, as they come."""

    def __init__(self, *, show_reasoning: bool) -> None:
        self._show_reasoning = show_reasoning
        self._is_terminal = sys.stdout.isatty()
        self._last = ""  # the last character written
        self._is_reasoning = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_reasoning()
        if self._last not in ("", "\n") and not isinstance(error, BrokenPipeError):
            self._write("\n")

    def reasoning(self, text: str) -> None:
        if not self._show_reasoning:
            return
        self._is_reasoning = True
        sys.stderr.write(styled(printable(text), dim=True))
        sys.stderr.flush()

    def answer(self, text: str) -> None:
        self._end_reasoning()
        if not self._last:
            text = text.lstrip("\n")
        if text:
            self._last = text[-1]
            self._write(printable(text) if self._is_terminal else text)

    def _end_reasoning(self) -> None:
        if self._is_reasoning:
            sys.stderr.write("\n")
            self._is_reasoning = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class MarkdownView:
    """Prints each finished block once; only the block still growing is drawn again.

    Drawing again everything costs 47 ms a frame at 1,000 tokens; one block costs a few. It is
    drawn at most 8 times a second, and less often if it is long.
    """

    def __init__(self, console: "Console", *, show_reasoning: bool) -> None:
        from rich.live import Live

        self._console = console
        self._show_reasoning = show_reasoning
        self._splitter = BlockSplitter()
        self._reasoning = ""
        self._num_blocks = 0
        self._next_draw_s = 0.0
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        from rich.text import Text

        self._live.start()
        self._live.update(Text("...", style="dim"), refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        from rich.text import Text

        self._end_reasoning()
        self._print_block(self._splitter.flush())
        self._live.update(Text(""))
        self._live.stop()

    def reasoning(self, text: str) -> None:
        self._reasoning += printable(text)
        if self._show_reasoning:
            self._draw(self._reasoning_text())

    def answer(self, text: str) -> None:
        self._end_reasoning()
        for block in self._splitter.push(printable(text)):
            self._print_block(block)
        if self._splitter.open.strip():
            self._draw(_markdown(self._splitter.open))

    def _reasoning_text(self) -> "RenderableType":
        from rich.text import Text

        return Text(self._reasoning.strip(), style="dim italic")

    def _end_reasoning(self) -> None:
        if self._reasoning.strip() and self._show_reasoning:
            self._print(self._reasoning_text())
        self._reasoning = ""

    def _print_block(self, block: str) -> None:
        if block.strip():
            self._print(_markdown(block))

    def _print(self, block: "RenderableType") -> None:
        from rich.text import Text

        self._live.update(Text(""))
        if self._num_blocks:
            self._console.print()
        self._console.print(block)
        self._num_blocks += 1
        self._next_draw_s = 0.0

    def _draw(self, block: "RenderableType") -> None:
        begin_s = time.monotonic()
        if begin_s < self._next_draw_s:
            return
        self._live.update(self._tail(block), refresh=True)
        end_s = time.monotonic()
        self._next_draw_s = end_s + max(REFRESH_S, RENDER_SHARE * (end_s - begin_s))

    def _tail(self, block: "RenderableType") -> "RenderableType":
        """The last lines of ``block``, as many as the terminal shows."""
        from rich.segment import Segment, Segments

        lines = self._console.render_lines(block, pad=False)
        if self._num_blocks:
            lines = [[], *lines]
        shown = lines[-max(1, self._console.height - 2) :]
        flat = [part for line in shown for part in (*line, Segment.line())]
        return Segments(flat[:-1])


def _markdown(text: str) -> "RenderableType":
    from fiddler.cli.chat_markdown import ChatMarkdown

    return ChatMarkdown(text)


def show_finish(finish_reason: str, *, is_context_full: bool, may_grow: bool) -> None:
    """Say on standard error why an answer ended before its end, and what lets it go on."""
    if finish_reason == "length" and is_context_full:
        more = ", --context N at the start more" if may_grow else ""
        note(f"(cut at the end of the context; /forget makes room{more})")
    elif finish_reason == "length":
        note("(cut at max_tokens; /set max_tokens=none lets answers go on)")
    elif finish_reason == "cancelled":
        note("(stopped; what was written is kept)")


def note_stats(stats: RunStats, expected: "Expected") -> None:
    """Write the statistics of an answer to standard error, dim; and that it was far off."""
    for line in folded(stats_line(stats), error_width()):
        note(line)
    if remark := expected.remark(stats):
        note(remark)

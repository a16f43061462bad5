"""Markdown on the terminal: rich's renderer with the parts that suit a chat."""

from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax

CODE_THEME = "ansi_dark"  # the terminal's own colours, on its own background


class LeftHeading(Heading):
    """rich centres the first level, which looks lost above short answers."""

    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class CompactCode(CodeBlock):
    """Indented by two columns instead of framed by blank lines."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=CODE_THEME, word_wrap=True, padding=(0, 2))


class ChatMarkdown(Markdown):
    """Left-bound, no blank space around, link targets spelled out, HTML shown as it was written.

    rich drops HTML, which would make ``List<int>`` in prose lose its ``<int>``.
    """

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": LeftHeading,
        "fence": CompactCode,
        "code_block": CompactCode,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
        self.markup = text
        self.parsed = parser.parse(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [
            segment
            for part in super().__rich_console__(console, options)
            for segment in ([part] if isinstance(part, Segment) else console.render(part, options))
        ]
        for line in _without_margins([_trimmed(line) for line in Segment.split_lines(parts)]):
            yield from line
            yield Segment.line()


def _trimmed(line: list[Segment]) -> list[Segment]:
    """``line`` without the spaces that fill it up, which would be copied with the text."""
    while line and not line[-1].text.rstrip():
        line = line[:-1]
    if not line:
        return []
    *before, last = line
    return [*before, Segment(last.text.rstrip(), last.style, last.control)]


def _without_margins(lines: list[list[Segment]]) -> list[list[Segment]]:
    """``lines`` without empty ones at both ends."""
    filled = [number for number, line in enumerate(lines) if line]
    return lines[filled[0] : filled[-1] + 1] if filled else []

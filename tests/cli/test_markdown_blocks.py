"""Blocks are cut so that rendering them one by one looks like rendering the whole."""

import io
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fiddler.cli.chat_markdown import ChatMarkdown
from fiddler.cli.markdown_blocks import BlockSplitter

LINES = [
    "some words",
    "more *words*",
    "",
    "",
    "# heading",
    "---",
    "- item",
    "  - nested",
    "  more of it",
    "1. first",
    "12. twelfth",
    "   deep text",
    "```python",
    "```",
    "~~~",
    "    code",
    "> quoted",
    "| a | b |",
    "|---|---|",
    "***",
    "====",
    "`tick`",
]
texts = st.lists(st.sampled_from(LINES), max_size=16).map("\n".join)


def split(text: str, sizes: list[int]) -> list[str]:
    """Feed ``text`` in pieces of ``sizes``, repeated, and return all blocks."""
    splitter, blocks, start = BlockSplitter(), [], 0
    for size in itertools.cycle(sizes):
        if start >= len(text):
            break
        blocks += splitter.push(text[start : start + size])
        start += size
    return [*blocks, splitter.flush()]


def render(blocks: list[str]) -> list[str]:
    console = Console(file=io.StringIO(), width=40, force_terminal=False)
    for block in blocks:
        if block.strip():
            console.print(ChatMarkdown(block))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return [line for line in lines if line]  # the space between blocks is the view's business


@given(text=texts, sizes=st.lists(st.integers(1, 9), min_size=1))
def test_blocks_joined_are_the_text(text: str, sizes: list[int]) -> None:
    assert "".join(split(text, sizes)) == text


@given(text=texts, sizes=st.lists(st.integers(1, 9), min_size=1))
def test_pieces_do_not_matter(text: str, sizes: list[int]) -> None:
    assert split(text, sizes) == split(text, [len(text) or 1])


@settings(max_examples=100)
@given(text=texts)
def test_blockwise_rendering_equals_whole_rendering(text: str) -> None:
    assert render(split(text, [len(text) or 1])) == render([text])


def test_a_paragraph_is_finished_at_the_blank_line() -> None:
    splitter = BlockSplitter()
    assert splitter.push("one\ntwo\n") == []
    assert splitter.push("\nthree") == ["one\ntwo\n\n"]
    assert splitter.open == "three"


def test_blank_lines_inside_a_code_fence_do_not_cut() -> None:
    splitter = BlockSplitter()
    assert splitter.push("```\na\n\nb\n") == []
    assert splitter.push("```\nafter") == ["```\na\n\nb\n```\n"]

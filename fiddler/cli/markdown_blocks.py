"""Cuts streamed Markdown into blocks, so that a finished block is rendered once and never again.

A block ends where what follows cannot change how it looks: after a closed code fence, a heading or
a rule, and at a blank line, unless a list or its indented text goes on behind it.
"""

import re

FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
SINGLE_LINE = re.compile(r" {0,3}(#{1,6}(\s|$)|([-*_])(\s*\3){2,}\s*$)")  # heading or rule
SETEXT = re.compile(r" {0,3}-+\s*$")  # underlines the paragraph above it
LIST_ITEM = re.compile(r" {0,3}([-*+]|\d{1,9}[.)])(\s|$)")
INDENTED = re.compile(r"( {2,}|\t)\S")
CODE = re.compile(r"( {4,}|\t)\S")


class BlockSplitter:
    """Feed text with :meth:`push`; all blocks and :attr:`open` joined are the text, unchanged."""

    def __init__(self) -> None:
        self._lines: list[str] = []  # complete lines of the open block
        self._partial = ""  # the line still being written
        self._fence = ""  # what closes the open code fence
        self._spans_gaps = False  # a list or indented code, which may go on behind a blank line
        self._has_gap = False  # its last line is blank

    @property
    def open(self) -> str:
        """The text of the block that is not finished yet."""
        return "".join(self._lines) + self._partial

    def push(self, text: str) -> list[str]:
        """Take more text and return the blocks that it finished."""
        *lines, self._partial = (self._partial + text).split("\n")
        return [block for line in lines for block in self._push_line(line)]

    def flush(self) -> str:
        """Return the open block as it is and start anew."""
        rest = self.open
        self._partial = ""
        self._cut()
        return rest

    def _push_line(self, line: str) -> list[str]:
        if self._fence:
            self._lines.append(line + "\n")
            return [self._cut()] if self._closes_fence(line) else []
        before = [self._cut()] if self._is_new_block(line) else []
        self._lines.append(line + "\n")
        return before + ([self._cut()] if self._is_last_line(line) else [])

    def _is_new_block(self, line: str) -> bool:
        """Whether ``line`` belongs no more to the open block."""
        if not self._lines or not line.strip():
            return False
        interrupts = bool(FENCE.match(line) or SINGLE_LINE.match(line)) and not SETEXT.match(line)
        if self._spans_gaps:
            goes_on = LIST_ITEM.match(line) or INDENTED.match(line)
            return not goes_on and (self._has_gap or interrupts)
        return interrupts

    def _is_last_line(self, line: str) -> bool:
        """Whether the open block is finished with ``line``, which was just added to it."""
        self._has_gap = not line.strip()
        is_first = len(self._lines) == 1
        if LIST_ITEM.match(line) or (is_first and CODE.match(line)):
            self._spans_gaps = True
        if self._spans_gaps:
            return False
        if fence := FENCE.match(line):
            self._fence = fence[1]
            return False
        return self._has_gap or bool(SINGLE_LINE.match(line))

    def _closes_fence(self, line: str) -> bool:
        mark = re.escape(self._fence[0])
        return bool(re.fullmatch(rf" {{0,3}}{mark}{{{len(self._fence)},}}\s*", line))

    def _cut(self) -> str:
        block = "".join(self._lines)
        self._lines, self._fence = [], ""
        self._spans_gaps = self._has_gap = False
        return block

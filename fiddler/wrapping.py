"""Lines broken at blanks, for a terminal that would break them within words and numbers."""

import textwrap

GLUE = "\N{NO-BREAK SPACE}"  # textwrap breaks at ASCII's blanks only


def glued(text: str) -> str:
    """``text`` that :func:`wrapped` does not break."""
    return text.replace(" ", GLUE)


def wrapped(label: str, text: str, width: int) -> list[str]:
    """``text`` behind ``label`` in lines of ``width``, broken at blanks; a longer word stays."""
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(GLUE, " ") for line in lines]


def fitted(text: str, width: int) -> list[str]:
    """The lines of ``text``; one that is longer than ``width`` is broken behind its own indent."""
    found: list[str] = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        found += [line] if len(line) <= width else wrapped(indent, line.strip(), width)
    return found

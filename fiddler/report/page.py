"""One self-contained HTML page: headings, tables, pictures; nothing is fetched, no script runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fiddler._version import __version__

# Shades of the heatmap from unused to busiest, on a light page and on a dark one.
_LIGHT = ["f3f6fb", "dfe9f5", "c6dbef", "9ecae1", "6baed6", "4292c6", "2171b5", "08519c", "08306b"]
_DARK = ["171d26", "1b2a3d", "1d3a59", "1f4d7a", "2a669e", "4683bd", "6ea5d6", "a3c8ea", "dcecfb"]
# Parts of a memory: told apart by people who see fewer colours too, as brightness differs.
PART_COLOURS = {
    "experts": "4269d0",
    "dense": "efb118",
    "kv": "3ca951",
    "workspace": "a463f2",
    "staging": "97bbf5",
    "context": "9c6b4e",
    "margin": "ff8ab7",
    "unused": "9498a0",
}

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2430; --muted: #56616f; --line: #d5dbe3;
  --edge: #d6184f; --bar: #6a7fb0; --cpu: #b3541e; --gpu: #1f5fbf; --link: #3c7d2c; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --ink: #e6eaf0; --muted: #9aa6b4;
  --line: #2d3540; --edge: #ff6b93; --bar: #7f95c9; --cpu: #f2a065; --gpu: #7fb2ff;
  --link: #8fd07c; DARK } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 800px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p, li { max-width: 46rem; }
figure { margin: 1rem 0; overflow-x: auto; }
svg { width: 100%; min-width: 600px; height: auto; display: block; }
svg text { fill: var(--ink); font-family: system-ui, sans-serif; }
svg .muted, footer { fill: var(--muted); color: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.grid { stroke: var(--line); fill: none; } .edge { stroke: var(--edge); stroke-width: 2;
  fill: none; } .bar { fill: var(--bar); }
.roof { fill: none; stroke-width: 2; } .dot { stroke: var(--page); }
KINDS
"""


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in text; the first column names the rows."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with a sentence or two, pictures (SVG) and a table below it."""

    title: str
    words: str = ""
    pictures: tuple[str, ...] = ()
    table: Table | None = None


def page(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    """The page's text; ``facts`` are lines below the title."""
    body = "".join(map(_section, sections))
    lines = "".join(f"<p>{escape(fact)}</p>" for fact in facts if fact)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f'<meta name="generator" content="fiddler {__version__}"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{escape(title)}</title><style>{style()}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{lines}{body}</main>"
        f"<footer><p>fiddler {__version__}</p></footer></body></html>\n"
    )


def style() -> str:
    """The page's CSS, which the pictures' colours come from."""
    light, dark = (
        " ".join(f"--level-{n}: #{colour};" for n, colour in enumerate(colours))
        for colours in (_LIGHT, _DARK)
    )
    kinds = [f".level-{n} {{ fill: var(--level-{n}); }}" for n in range(len(_LIGHT))]
    kinds += [f".part-{name} {{ fill: #{colour}; }}" for name, colour in PART_COLOURS.items()]
    for name in ("cpu", "gpu", "link"):
        kinds.append(f".roof-{name} {{ stroke: var(--{name}); }}")
        kinds.append(f"svg .name-{name} {{ fill: var(--{name}); }}")
        kinds.append(f".dot.roof-{name} {{ fill: var(--{name}); stroke: var(--page); }}")
    text = _STYLE.replace("LIGHT", light).replace("DARK", dark)
    return text.replace("KINDS", "\n".join(kinds))


def _section(section: Section) -> str:
    words = f"<p>{escape(section.words)}</p>" if section.words else ""
    pictures = "".join(f"<figure>{picture}</figure>" for picture in section.pictures)
    table = _table(section.table) if section.table is not None else ""
    return f"<section><h2>{escape(section.title)}</h2>{words}{pictures}{table}</section>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in table.headings)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'

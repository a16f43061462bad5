"""Elements of SVG as text, and how wide text is.

Colours are CSS variables of :mod:`fiddler.report.page`, so that a picture follows the reader's
light or dark setting. Lengths are pixels of a picture WIDTH wide.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH = 760
FONT = 12  # pixels
CHARACTER = 0.6  # of the font's size: a mean letter of a sans-serif font, rounded up


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; ``right`` and ``bottom`` are outside it."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether any point is in both."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def text_width(text: str, size: float = FONT) -> float:
    """About how wide ``text`` is drawn."""
    return len(text) * size * CHARACTER


def text_box(x: float, y: float, text: str, anchor: str = "start", size: float = FONT) -> Box:
    """Where ``text`` with its baseline at ``y`` is drawn."""
    width = text_width(text, size)
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return Box(left, y - 0.8 * size, left + width, y + 0.25 * size)


def element(name: str, content: str | Iterable[str] = (), **attributes: object) -> str:
    """One element; ``content`` is markup already. ``_`` in a name is written ``-``."""
    given = "".join(
        f" {key.strip('_').replace('_', '-')}={quoteattr(number(value))}"
        for key, value in attributes.items()
    )
    inner = content if isinstance(content, str) else "".join(content)
    return f"<{name}{given}>{inner}</{name}>" if inner else f"<{name}{given}/>"


def number(value: object) -> str:
    """Numbers with two digits behind the point at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, anchor: str = "start", **attributes: object) -> str:
    """A line of text with its baseline at ``y``."""
    where = {"x": float(x), "y": float(y)}
    if anchor != "start":
        attributes = {"text_anchor": anchor, **attributes}
    return element("text", escape(content), **where, **attributes)


def titled(content: str | Iterable[str], title: str) -> str:
    """A group with a title, which a pointer shows and a screen reader says."""
    inner = content if isinstance(content, str) else "".join(content)
    return element("g", element("title", escape(title)) + inner)


def picture(height: float, title: str, description: str, content: Iterable[str]) -> str:
    """The whole SVG element, WIDTH wide."""
    head = element("title", escape(title)) + element("desc", escape(description))
    return element(
        "svg",
        head + "".join(content),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {number(float(height))}",
        role="img",
        font_size=FONT,
    )

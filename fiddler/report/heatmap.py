"""How unevenly layers use their experts, as SVG: a row for each layer, the most used on the left.

Shapes: M layers with experts, E experts.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fiddler.report.svg import FONT, WIDTH, element, picture, text, text_width, titled

LEVELS = 9  # shades, a factor of 2 ** 0.75 apart around the even share
MOST_HEIGHT, LEAST_ROW, MOST_ROW = 560, 5, 18  # pixels
TOP, BOTTOM, BAR_WIDTH, LABEL_WIDTH, GAP = 28, 56, 76, 34, 14
COLUMN = GAP + BAR_WIDTH + LABEL_WIDTH  # of bars
LEGEND_WIDTH = 18  # of a shade


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """Shares of each layer's routes by expert; of the most used ``residents_M`` are on the GPU.

    ``hits_M``: share of routes that meet one of them. ``bits_M``: entropy of each layer's shares.
    """

    layers: tuple[int, ...]
    shares_ME: npt.NDArray[np.float64]
    residents_M: tuple[int, ...]
    hits_M: tuple[float, ...]
    bits_M: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar for each layer, as long as its part of the whole, with a label and what it means."""

    heading: str
    parts_M: tuple[float, ...]
    labels_M: tuple[str, ...]
    titles_M: tuple[str, ...]


def heatmap_svg(heatmap: Heatmap, title: str) -> str:
    """The map, a line between GPU and CPU, and bars of hits and of entropy for each layer."""
    rows, experts = heatmap.shares_ME.shape
    height = min(MOST_ROW, max(LEAST_ROW, MOST_HEIGHT // rows))
    left = text_width(str(heatmap.layers[-1])) + 12
    columns = [*([_hits(heatmap)] if any(heatmap.residents_M) else []), _entropies(heatmap)]
    right = WIDTH - len(columns) * COLUMN
    cell = (right - left) / experts
    bottom = TOP + rows * height
    parts = [
        element("g", _cells(heatmap), transform=f"translate({left} {TOP}) scale({cell} {height})"),
        *_labels(heatmap, left, height),
        text(left, TOP - 8, "experts of each layer, the most used first"),
        *_legend(left, bottom + 22),
    ]
    if any(heatmap.residents_M):
        parts.append(element("path", d=_edge(heatmap, left, cell, height), class_="edge"))
    for place, bars in enumerate(columns):
        parts += _bars(bars, right + place * COLUMN + GAP, height)
    description = (
        f"{rows} layers with {experts} experts each. Stronger shades are used more. "
        "A line parts experts on the GPU, at its left, from those on the CPU."
    )
    return picture(bottom + BOTTOM, title, description, parts)


def levels(shares_ME: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The shade of each share: 0 an eighth of the even one or less, 8 eight times or more."""
    relative_ME = np.log2(np.maximum(shares_ME * shares_ME.shape[1], 1e-9))
    level_ME: npt.NDArray[np.int64] = np.rint((relative_ME + 3) / 6 * (LEVELS - 1)).astype(np.int64)
    return level_ME.clip(0, LEVELS - 1)


def _cells(heatmap: Heatmap) -> list[str]:
    """One path for each shade, of runs of cells: as few bytes as a picture would take."""
    level_ME = levels(-np.sort(-heatmap.shares_ME, axis=1))
    runs: list[list[str]] = [[] for _ in range(LEVELS)]
    for row, level_E in enumerate(level_ME):
        starts = np.flatnonzero(np.diff(level_E, prepend=-1))
        lengths = np.diff(starts, append=len(level_E))
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            runs[level_E[start]].append(f"M{start} {row}h{length}v1h-{length}z")
    return [
        element("path", d="".join(run), class_=f"level-{level}")
        for level, run in enumerate(runs)
        if run
    ]


def _edge(heatmap: Heatmap, left: float, cell: float, height: int) -> str:
    steps = "".join(f"H{left + count * cell:.1f}v{height}" for count in heatmap.residents_M)
    return f"M{left + heatmap.residents_M[0] * cell:.1f} {TOP}{steps}"


def _labels(heatmap: Heatmap, left: float, height: int) -> list[str]:
    every = max(1, -(-FONT // height))  # rows that a label takes
    return [
        text(left - 6, TOP + (row + 0.5) * height + 4, str(layer), "end", class_="muted")
        for row, layer in enumerate(heatmap.layers)
        if row % every == 0
    ]


def _hits(heatmap: Heatmap) -> Bars:
    pairs = list(zip(heatmap.layers, heatmap.hits_M, strict=True))
    return Bars(
        "hits on the GPU",
        heatmap.hits_M,
        tuple(f"{hits:.0%}" for _, hits in pairs),
        tuple(f"layer {layer}: {hits:.1%} of its routes" for layer, hits in pairs),
    )


def _entropies(heatmap: Heatmap) -> Bars:
    most = math.log2(max(2, heatmap.shares_ME.shape[1]))
    pairs = list(zip(heatmap.layers, heatmap.bits_M, strict=True))
    return Bars(
        "entropy, bits",
        tuple(bits / most for bits in heatmap.bits_M),
        tuple(f"{bits:.2f}" for _, bits in pairs),
        tuple(f"layer {layer}: entropy {bits:.2f} bits of {most:.2f}" for layer, bits in pairs),
    )


def _bars(bars: Bars, left: float, height: int) -> list[str]:
    parts = [text(left, TOP - 8, bars.heading)]
    every = max(1, -(-FONT // height))
    for row, part in enumerate(bars.parts_M):
        top = TOP + row * height
        bar = element(
            "rect",
            x=left,
            y=top + 0.1 * height,
            width=max(0.5, part * BAR_WIDTH),
            height=0.8 * height,
            class_="bar",
        )
        parts.append(titled(bar, bars.titles_M[row]))
        if row % every == 0:
            at = left + BAR_WIDTH + 4
            parts.append(text(at, top + height / 2 + 4, bars.labels_M[row], class_="muted"))
    return parts


def _legend(left: float, top: float) -> list[str]:
    shades = [
        element(
            "rect",
            x=left + level * LEGEND_WIDTH,
            y=top - 10,
            width=LEGEND_WIDTH,
            height=12,
            class_=f"level-{level}",
        )
        for level in range(LEVELS)
    ]
    end = left + LEVELS * LEGEND_WIDTH
    return [*shades, text(end + 8, top, "an eighth of the even share, to eight times as much")]

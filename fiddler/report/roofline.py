"""Speed against arithmetic for each byte, as SVG with two logarithmic axes.

A roof is the most that a memory and a processor allow together: bytes a second times operations a
byte, up to a ceiling of operations a second. Points are what was measured.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fiddler.report.svg import (
    FONT,
    WIDTH,
    Box,
    element,
    picture,
    text,
    text_box,
    text_width,
    titled,
)

HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LEGEND = 430, 64, 16, 16, 48, 22  # pixels
RADIUS = 5
GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """``ceiling_flops`` operations a second at most; infinite: not measured."""

    name: str
    kind: str  # decides the colour
    bytes_per_s: float
    ceiling_flops: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measurement: operations for each byte, and a second; ``kind`` as its roof's."""

    name: str
    kind: str
    intensity: float
    flops: float


@dataclass(frozen=True, slots=True)
class _Axes:
    """Decades that are shown, and where they lie."""

    x: tuple[int, int]
    y: tuple[int, int]

    def at(self, intensity: float, flops: float) -> tuple[float, float]:
        """Pixels; beyond the edges they go on."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        x = (math.log10(intensity) - self.x[0]) / (self.x[1] - self.x[0])
        y = (math.log10(flops) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + x * (right - LEFT), bottom - y * (bottom - TOP)


def roofline_svg(roofs: Sequence[Roof], points: Sequence[Point], title: str) -> str:
    """Roofs, named below, and points with their names where nothing else is in the way."""
    axes = _axes(roofs, points)
    taken = [
        Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
        for x, y in (axes.at(point.intensity, point.flops) for point in points)
    ]
    taken += [box for roof in roofs for box in _line_boxes(_corners(roof, axes))]
    parts = _grid(axes)
    parts += [_roof(roof, axes) for roof in roofs]
    parts += [dot for point in points for dot in _point(point, axes, taken)]
    parts += _legend(roofs)
    description = "; ".join(
        [f"{roof.name}: {roof.bytes_per_s / GIGA:,.0f} GB/s" for roof in roofs]
        + [f"{p.name}: {p.flops / GIGA:,.1f} GFLOP/s at {p.intensity:.3g}" for p in points]
    )
    return picture(HEIGHT + LEGEND, title, description, parts)


def _axes(roofs: Sequence[Roof], points: Sequence[Point]) -> _Axes:
    ridges = [r.ceiling_flops / r.bytes_per_s for r in roofs if math.isfinite(r.ceiling_flops)]
    xs = [0.5, *(point.intensity for point in points), *(2 * ridge for ridge in ridges)]
    x = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs) * 1.01))
    ceilings = [r.ceiling_flops for r in roofs if math.isfinite(r.ceiling_flops)]
    slowest = min((roof.bytes_per_s for roof in roofs), default=GIGA)
    ys = [slowest * 10.0 ** x[0], *ceilings, *(point.flops for point in points)]
    most = max([*ys, *(roof.bytes_per_s for roof in roofs)])
    y = math.floor(math.log10(min(ys))), math.ceil(math.log10(most * 1.5))
    return _Axes((x[0], max(x[1], x[0] + 1)), (y[0], max(y[1], y[0] + 1)))


def _grid(axes: _Axes) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for decade in range(axes.x[0], axes.x[1] + 1):
        x, _ = axes.at(10.0**decade, 1.0)
        parts.append(element("path", d=f"M{x:.1f} {TOP}V{bottom}", class_="grid"))
        if decade < axes.x[1]:
            parts.append(text(x, bottom + 18, _plain(decade), "middle", class_="muted"))
    every = -(-(axes.y[1] - axes.y[0]) // 8)
    for decade in range(axes.y[0], axes.y[1] + 1, every):
        _, y = axes.at(1.0, 10.0**decade)
        parts.append(element("path", d=f"M{LEFT} {y:.1f}H{right}", class_="grid"))
        parts.append(text(LEFT - 6, y + 4, _rate(decade), "end", class_="muted"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 10, "operations for each byte read", "middle"))
    parts.append(text(LEFT + 4, TOP - 4, "operations a second"))
    return parts


def _plain(decade: int) -> str:
    return f"{10**decade:,}" if decade >= 0 else f"{10.0**decade:g}"


def _rate(decade: int) -> str:
    prefixes = {0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
    base = max(0, min(18, decade // 3 * 3))
    return f"{10 ** (decade - base):g} {prefixes[base]}" if decade >= 0 else f"1e{decade}"


def _corners(roof: Roof, axes: _Axes) -> list[tuple[float, float]]:
    """From the left or the lower edge up the slope, then along the ceiling."""
    least_x, most_x = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    least_y, most_y = 10.0 ** axes.y[0], 10.0 ** axes.y[1]
    begin = max(least_x, least_y / roof.bytes_per_s)
    top = min(roof.ceiling_flops, most_y, roof.bytes_per_s * most_x)
    ridge = top / roof.bytes_per_s
    corners = [axes.at(begin, begin * roof.bytes_per_s), axes.at(ridge, top)]
    if math.isfinite(roof.ceiling_flops) and ridge < most_x:
        corners.append(axes.at(most_x, top))
    return corners


def _roof(roof: Roof, axes: _Axes) -> str:
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in _corners(roof, axes))
    return titled(element("path", d=path, class_=f"roof roof-{roof.kind}"), _name(roof))


def _legend(roofs: Sequence[Roof]) -> list[str]:
    parts, left = [], float(LEFT)
    for roof in roofs:
        name = _name(roof)
        path = f"M{left:.1f} {HEIGHT + 8}h20"
        parts.append(element("path", d=path, class_=f"roof roof-{roof.kind}"))
        parts.append(text(left + 26, HEIGHT + 12, name, class_=f"name-{roof.kind}"))
        left += 26 + text_width(name) + 20
    return parts


def _name(roof: Roof) -> str:
    return f"{roof.name}, {roof.bytes_per_s / GIGA:,.0f} GB/s"


def _line_boxes(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes along a line, close enough that no letter fits between them."""
    boxes = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        num = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0)) / 3))
        for n in range(num + 1):
            x, y = x0 + (x1 - x0) * n / num, y0 + (y1 - y0) * n / num
            boxes.append(Box(x - 1, y - 1, x + 1, y + 1))
    return boxes


def _point(point: Point, axes: _Axes, taken: list[Box]) -> list[str]:
    x, y = axes.at(point.intensity, point.flops)
    dot = element("circle", cx=x, cy=y, r=RADIUS, class_=f"dot roof-{point.kind}")
    about = f"{point.name}: {point.flops / GIGA:,.1f} GFLOP/s, {point.intensity:.3g} a byte"
    near = RADIUS + 4
    spots = [(x + near, y + 4, "start"), (x - near, y + 4, "end")]
    for far in range(1, 9):
        step = far * (FONT + 3)
        spots += [
            (x + near, y + 4 + step, "start"),
            (x + near, y + 4 - step, "start"),
            (x - near, y + 4 + step, "end"),
            (x - near, y + 4 - step, "end"),
        ]
    return [titled(dot, about), *_label(point.name, point.kind, spots, taken)]


def _label(
    label: str, kind: str, spots: list[tuple[float, float, str]], taken: list[Box]
) -> list[str]:
    """At the first of ``spots`` that is free and inside; nowhere if there is none."""
    for x, y, anchor in spots:
        box = text_box(x, y, label, anchor)
        is_inside = box.left >= LEFT and box.right <= WIDTH and box.top >= TOP
        if is_inside and box.bottom <= HEIGHT - BOTTOM and not any(map(box.overlaps, taken)):
            taken.append(box)
            return [text(x, y, label, anchor, class_=f"name-{kind}")]
    return []

"""The picture of a profile: how unevenly each layer uses its experts, and what a placement keeps.

Shapes: M layers with experts, E experts.
"""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fiddler.errors import ConfigError
from fiddler.held_out import ProfileResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SUFFIXES = (".png", ".svg")
SPAN = 8  # colours end at 1/8 and 8 times the even share
EDGE = "#ff3b6b"  # the line between both sides: no colour of the map


def check_picture(path: Path | str) -> None:
    """Raise :class:`ConfigError` if a picture could not be written to ``path``."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"a picture's name ends in .png or .svg, {path.name!r} does not")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "a picture needs matplotlib, which is not installed",
            hint="pip install 'fiddler-moe[viz]'",
        )


def save_picture(result: ProfileResult, path: Path | str) -> None:
    """Draw ``result`` as PNG or SVG, if :func:`check_picture` has no objection."""
    figure = draw(result)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def draw(result: ProfileResult) -> "Figure":
    """Layers as rows, experts from the most to the least used; beside it, each layer's hit rate."""
    from matplotlib.figure import Figure

    height = min(12.0, max(4.5, 2.8 + 0.16 * len(result.moe_layers)))  # inches
    figure = Figure(figsize=(11, height), layout="constrained")
    has_gpu_side = result.present.num_resident > 0
    panels = figure.subplots(
        1,
        1 + has_gpu_side,
        sharey=True,
        squeeze=False,
        gridspec_kw={"width_ratios": [5, 1][: 1 + has_gpu_side]},
    )[0]
    image = _draw_use(panels[0], result)
    if has_gpu_side:
        _draw_placement(panels[0], result)
        _draw_hits(panels[1], result)
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
    limit = round(math.log2(SPAN))
    ticks = list(range(-limit, limit + 1))
    colours = figure.colorbar(image, ax=list(panels), ticks=ticks, pad=0.02, extend="both")
    colours.ax.set_yticklabels([f"{2**t}x" if t >= 0 else f"1/{2**-t}x" for t in ticks])
    colours.set_label("share, relative to even use")
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=12)
    return figure


def _draw_use(axes: "Axes", result: ProfileResult) -> "AxesImage":
    """The map: colour is the logarithm of an expert's share over the even share."""
    from matplotlib.ticker import MaxNLocator

    shares_ME = result.profile.popularity.shares()[list(result.moe_layers)]
    num_rows, num_experts = shares_ME.shape
    image = axes.imshow(
        np.log2(-np.sort(-shares_ME, axis=1) * num_experts),
        cmap="viridis",
        vmin=-math.log2(SPAN),
        vmax=math.log2(SPAN),
        extent=(0.5, num_experts + 0.5, num_rows - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("experts of each layer, the most used first")
    axes.set_ylabel("layer")
    rows = range(0, num_rows, max(1, num_rows // 16))
    axes.set_yticks(list(rows), [str(result.moe_layers[row]) for row in rows])
    return image


def _draw_placement(axes: "Axes", result: ProfileResult) -> None:
    """A line between the experts on the GPU side and those on the CPU side."""
    residents = [len(result.placement.resident[layer]) for layer in result.moe_layers]
    axes.stairs(
        np.array(residents) + 0.5,
        np.arange(len(residents) + 1) - 0.5,
        orientation="horizontal",
        baseline=None,
        color=EDGE,
        linewidth=1.8,
        label="left: on the GPU side; right: on the CPU side",
    )


def _draw_hits(axes: "Axes", result: ProfileResult) -> None:
    """Per layer, the held-out routes that meet a resident expert."""
    hits = [_layer_hit_rate(result, layer) for layer in result.moe_layers]
    axes.barh(range(len(hits)), hits, height=0.8, color="#3b528b")
    axes.axvline(
        result.present.profile, color="black", linestyle=":", label="hit rate over all layers"
    )
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
    axes.set_xlabel("held-out hit rate")
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)


def _layer_hit_rate(result: ProfileResult, layer: int) -> float:
    row_E = result.held_out_LE[layer]
    return float(row_E[sorted(result.placement.resident[layer])].sum() / max(1, row_E.sum()))


def _title(result: ProfileResult) -> str:
    profile, present = result.profile, result.present
    num_experts = profile.popularity.counts_LE.shape[1]
    total = len(result.moe_layers) * num_experts
    title = f"{profile.model}: use of its experts over {profile.num_tokens:,} tokens"
    if not present.num_resident:
        return title
    return (
        f"{title}\n{present.num_resident:,} of {total:,} experts on the GPU side catch "
        f"{present.profile:.0%} of {result.held_out_tokens:,} held-out tokens' routes; "
        f"{present.uniform:.0%} without a profile"
    )

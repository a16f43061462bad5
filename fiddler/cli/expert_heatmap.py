"""Which experts were used, as text: one row for each layer, darker for busier."""

from collections.abc import Sequence

RAMP = " .:-=+*#%@"


def heatmap_lines(counts: Sequence[Sequence[int]], *, width: int) -> list[str]:
    """Rows of ``counts[layer][expert]`` at most ``width`` columns wide, and a legend.

    Each row has its own scale. Where there are more experts than columns, neighbours share one.
    The percentage is what the busiest quarter of the layer's experts got; an even layer has 25 %.
    """
    total = sum(map(sum, counts))
    if not total:
        return ["no tokens were routed yet"]
    label = len(str(len(counts) - 1))
    room = max(8, width - label - len("layer   ||  100 %"))
    rows = [
        f"layer {layer:>{label}} |{_shades(row, room)}| {100 * _top_quarter(row):3.0f} %"
        for layer, row in enumerate(counts)
        if any(row)
    ]
    shades = f"'{RAMP[0]}' unused to '{RAMP[-1]}' the busiest of its layer"
    return [*rows, f"{total:,} choices; {shades};", "right: what the busiest quarter got"]


def _shades(row: Sequence[int], room: int) -> str:
    size = -(-len(row) // room)  # experts in one column
    sums = [sum(row[start : start + size]) for start in range(0, len(row), size)]
    most = max(sums)
    steps = len(RAMP) - 1
    return "".join(RAMP[-(-count * steps // most)] for count in sums)


def _top_quarter(row: Sequence[int]) -> float:
    busiest = sorted(row, reverse=True)[: max(1, len(row) // 4)]
    return sum(busiest) / sum(row)

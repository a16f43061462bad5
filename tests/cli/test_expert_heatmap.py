"""The heatmap fits its width and is darkest where the counts are highest."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fiddler.cli.expert_heatmap import RAMP, heatmap_lines


def table(seed: int, num_layers: int, num_experts: int) -> list[list[int]]:
    draw = random.Random(seed)
    used = [draw.choice([0, 1, 1000]) for _ in range(num_layers)]
    return [[draw.randint(0, most) for _ in range(num_experts)] for most in used]


tables = st.builds(table, st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 200))


@given(counts=tables, width=st.integers(40, 120))
def test_rows_fit_and_unused_layers_are_left_out(counts: list[list[int]], width: int) -> None:
    rows = [line for line in heatmap_lines(counts, width=width) if line.startswith("layer")]
    assert len(rows) == sum(any(row) for row in counts)
    assert all(len(row) <= width for row in rows)


@given(row=st.lists(st.integers(0, 1000), min_size=2, max_size=30).filter(any))
def test_shades_follow_the_counts(row: list[int]) -> None:
    line = heatmap_lines([row], width=80)[0]
    shades = [RAMP.index(char) for char in line.split("|")[1]]
    assert len(shades) == len(row)
    assert [shade == 0 for shade in shades] == [count == 0 for count in row]
    assert shades[row.index(max(row))] == len(RAMP) - 1
    ordered = sorted(zip(row, shades, strict=True))
    assert [shade for _, shade in ordered] == sorted(shades)


def test_the_share_of_the_busiest_quarter() -> None:
    assert heatmap_lines([[5, 1, 1, 1]], width=80)[0].endswith(" 62 %")
    assert heatmap_lines([[3, 3, 3, 3]], width=80)[0].endswith(" 25 %")


def test_nothing_routed_is_said() -> None:
    assert heatmap_lines([[0, 0]], width=80) == ["no tokens were routed yet"]

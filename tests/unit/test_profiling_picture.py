"""The heatmap: the right cells in the right order, in both formats, refused in time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fiddler.errors import ConfigError
from fiddler.heatmap import check_picture, draw, save_picture
from fiddler.held_out import ProfileResult, judge
from offload.popularity import Popularity, Profile

COUNTS = np.array([[30, 0, 0, 10], [0, 0, 0, 0], [7, 8, 9, 16]])
MOE_LAYERS = (0, 2)


def result(num_resident: int = 3) -> ProfileResult:
    profile = Profile(
        model="org/name",
        architecture=None,
        revision=None,
        corpus_sha256="h",
        num_tokens=1234,
        popularity=Popularity(COUNTS),
        created="now",
    )
    return judge(
        profile, COUNTS[None], moe_layers=MOE_LAYERS, num_resident=num_resident, held_out_tokens=321
    )


def test_cells_are_shares_relative_to_even_use_sorted_by_layer() -> None:
    pytest.importorskip("matplotlib")
    figure = draw(result())
    cells_ME = np.exp2(np.asarray(figure.axes[0].images[0].get_array()))
    assert cells_ME.shape == (2, 4)
    assert cells_ME.sum(axis=1) == pytest.approx([4, 4])
    assert (np.diff(cells_ME, axis=1) <= 0).all()
    assert cells_ME[1] == pytest.approx(np.array([17, 10, 9, 8]) / 44 * 4)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "2"]
    assert figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel() == "layer"
    title = figure.get_suptitle()
    assert "org/name" in title and "1,234 tokens" in title and "3 of 8" in title


def test_bars_are_held_out_hit_rates() -> None:
    pytest.importorskip("matplotlib")
    made = result()
    widths = [bar.get_width() for bar in draw(made).axes[1].patches]
    expected = [
        COUNTS[layer, sorted(made.placement.resident[layer])].sum() / 40 for layer in MOE_LAYERS
    ]
    assert widths == pytest.approx(expected)


def test_without_a_gpu_side_there_is_only_the_map() -> None:
    pytest.importorskip("matplotlib")
    figure = draw(result(num_resident=0))
    assert len(figure.axes[0].images) == 1
    assert len(figure.axes) == 2  # the map and its colours
    assert "GPU" not in figure.get_suptitle()


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_both_formats_are_written(tmp_path: Path, suffix: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"heatmap{suffix}"
    check_picture(path)
    save_picture(result(), path)
    assert path.read_bytes().startswith(magic)


def test_a_picture_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.png or \.svg"):
        check_picture(tmp_path / "heatmap.gif")
    with pytest.raises(ConfigError, match="there is no folder"):
        check_picture(tmp_path / "none" / "heatmap.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs matplotlib") as caught:
        check_picture(tmp_path / "heatmap.png")
    assert "pip install" in caught.value.hint


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, fiddler.heatmap; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""``fiddler quantize`` on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fiddler.cli import cli
from fiddler.models.registry import load_config
from tests.tiny_models import shared_tiny


@pytest.fixture
def tiny() -> Path:
    return shared_tiny("qwen3_moe", moe_intermediate_size=64)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["quantize", *map(str, arguments)])


def test_a_folder_is_made_and_printed(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, "--scheme", "w4g64", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "24 experts in 0.17 MB, 28.1% of bfloat16" in done.stderr


def test_a_text_makes_it_gptq_and_poor_experts_are_told(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiddler.quantize.calibration.WINDOW", 32)
    (tmp_path / "text.txt").write_text("a text of a few more letters than 32")
    text = tmp_path / "text.txt"
    done = run(tiny, "--scheme", "w4g64", "--calibration", text, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "saw fewer than 16 tokens of the text and are rounded without it" in done.stderr
    assert '"method": "gptq"' in (tmp_path / "out" / "config.json").read_text()


def test_an_unknown_scheme_names_the_nearest(tiny: Path, tmp_path: Path) -> None:
    done = run(tiny, "--scheme", "w4g12", "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "no scheme 'w4g12'; did you mean 'w4g128'?" in done.stderr


def test_an_interruption_says_how_to_go_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("fiddler.quantize.layers.write_shard", interrupted)
        done = run(tiny, "--scheme", "w4g64", "-o", tmp_path / "out")
    assert done.exit_code == 130 and "--resume" in done.stderr
    again = run(tiny, "--scheme", "w4g64", "-o", tmp_path / "out")
    assert again.exit_code == 1 and "interrupted run left" in again.stderr
    done = run(tiny, "--scheme", "w4g64", "-o", tmp_path / "out", "--resume")
    assert done.exit_code == 0 and load_config(tmp_path / "out").num_experts == 8

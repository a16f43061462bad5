"""Whoever asks for outliers that cost more than they need is told so, with what costs less."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cpu_kernels.weight_kind import ROUNDED_KINDS, WeightKind, parse_kind
from fiddler.models.config import ModelConfig
from fiddler.models.registry import load_config
from fiddler.quantize.outlier_size import outlier_note, with_outliers
from fiddler.quantize.sensitivity import share_of
from tests.quantize.conftest import Quantize
from tests.tiny_models import shared_tiny

SIZES = [(2048, 768), (4096, 14336), (256, 128), (384, 256), (64, 96)]
NARROW = [kind for kind in ROUNDED_KINDS if kind.bits == 4]


def model(hidden: int, width: int) -> ModelConfig:
    return replace(load_config(shared_tiny("mixtral")), hidden_size=hidden, expert_size=width)


def share(config: ModelConfig, kind: WeightKind, count: int = 0) -> float:
    return share_of(with_outliers(config, kind, count), kind)


@pytest.mark.parametrize("sizes", SIZES)
def test_what_is_named_takes_less_and_nothing_is_said_where_nothing_does(
    sizes: tuple[int, int],
) -> None:
    config, most = model(*sizes), min(sizes)
    said = 0
    for kind in NARROW:
        if any(side % kind.group for side in sizes):
            continue
        group = max(g for g in (32, 64, 128) if not any(side % g for side in sizes))
        eight = share(config, replace(kind, codes="int8", group=group))
        for count in {1, 16, 31, 32, 33, 64, 127, 128, 129, 256, most - 1} & set(range(most)):
            whole = -(-count // kind.group) * kind.group
            asked = share(config, kind, count)
            is_dear = asked >= eight or (whole < most and asked > share(config, kind, whole))
            note = outlier_note(config, kind, count)
            assert bool(note) == is_dear, (kind, count)
            said += is_dear
            if is_dear:
                found = re.search(r"; --scheme (\S+)(?: --outliers (\d+))? takes (\S+)$", note)
                assert found is not None and f"take {asked:.3f} of" in note
                better = share(config, parse_kind(found[1]), int(found[2] or 0))
                assert f"{better:.3f}" == found[3] and better <= min(asked, eight)
    assert said


@pytest.mark.parametrize("count", [0, 128])
def test_a_good_choice_is_made_in_silence(count: int) -> None:
    assert outlier_note(model(2048, 768), parse_kind("w4g128"), count) == ""


def test_a_run_says_it_before_it_starts(
    run: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: Path
) -> None:
    (tmp_path / "short.txt").write_text("short")
    with caplog.at_level(logging.WARNING, "fiddler"), pytest.raises(Exception, match="one window"):
        run("w4g32", outliers=5, calibration=tmp_path / "short.txt")
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith("5 outliers beside groups of 32 take 1.125 of the experts' size")

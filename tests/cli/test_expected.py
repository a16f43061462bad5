"""A word about answers that took much longer, or less long, than this machine's rates promise."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from fiddler.cli.expected import LEAST_TOKENS, Expected
from fiddler.config import EngineConfig
from fiddler.models.registry import parse_config
from fiddler.models.shapes import SHAPES
from fiddler.outputs import RunStats
from fiddler.planning import plan_model
from fiddler.speed import demand_of, drawn_chances
from offload.prediction import predict_decode
from offload.reference_machines import find_machine

MACHINE = find_machine("h200-16core")


def model(shape: str) -> Any:
    config = parse_config(SHAPES[shape])
    settings = EngineConfig(model=shape, load_format="dummy", max_model_len=2048, vram_gb=24)
    plan, dtypes = plan_model(settings, config, MACHINE.hardware, name=shape, folder=None)
    return SimpleNamespace(model_config=config, dtypes=dtypes, hardware=MACHINE.hardware, plan=plan)


def stats_of(loaded: Any, times: float, tokens: int = 101, hits: int = 30) -> RunStats:
    """Of an answer that took so many times as long as predicted."""
    layers = drawn_chances(loaded.model_config, loaded.plan, None, hits / 100)
    asked = demand_of(loaded.model_config, loaded.dtypes, loaded.plan, layers=layers)
    step_s = predict_decode(asked, MACHINE.rates, rows=1, depth=500 + tokens // 2).seconds
    return RunStats(
        prompt_tokens=500,
        output_tokens=tokens,
        decode_s=times * step_s * (tokens - 1),
        expert_tokens_gpu=hits,
        expert_tokens_cpu=100 - hits,
    )


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.cli.expected.own_rates", lambda hardware: (MACHINE.rates, ""))


def test_what_is_far_off_is_said_with_what_an_answer_waits_for() -> None:
    loaded = model("qwen3-30b-a3b")
    expected = Expected(loaded)
    assert [expected.remark(stats_of(loaded, times)) for times in (0.8, 1.0, 1.2)] == [""] * 3
    slow = expected.remark(stats_of(loaded, 1.5))
    found = re.fullmatch(
        r"decode took 1\.50 times as long as predicted \((\d+\.\d) tok/s, (\d+)% of it cold "
        r"experts, (CPU|pulled)\); fiddler bench says which part is off",
        slow,
    )
    assert found and 30 < float(found[1]) < 60 and 60 < int(found[2]) < 95, slow
    assert expected.remark(stats_of(loaded, 0.5)).startswith("decode took 0.50 times the time pre")
    # hits are those of the answer: with most of them the same time is a slow one
    hot = stats_of(loaded, 1.0, hits=95)
    assert expected.remark(hot) == ""
    cold = stats_of(loaded, 1.0, hits=5)
    slow_hits = RunStats(**{**vars_of(hot), "decode_s": cold.decode_s})
    assert "times as long as predicted" in expected.remark(slow_hits)


def vars_of(stats: RunStats) -> dict[str, Any]:
    return {name: getattr(stats, name) for name in RunStats.__dataclass_fields__}


@pytest.mark.parametrize(
    ("shape", "tokens", "is_measured"),
    [
        ("qwen3-30b-a3b", LEAST_TOKENS - 1, True),
        ("qwen3-30b-a3b", 101, False),
        ("olmoe-1b-7b", 101, True),  # all resident: Python takes as long
    ],
)
def test_nothing_is_said_of_what_cannot_be_told(
    shape: str, tokens: int, is_measured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_measured:
        monkeypatch.setattr(
            "fiddler.cli.expected.own_rates", lambda hardware: (None, "not calibrated")
        )
    loaded = model(shape)
    expected = Expected(loaded)
    assert expected.remark(stats_of(loaded, 2.0, tokens)) == ""
    assert expected.remark(RunStats(output_tokens=tokens)) == ""

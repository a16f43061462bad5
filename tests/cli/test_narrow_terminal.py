"""What commands print on a terminal of few columns: nothing is broken within a word or a number."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_llm import FakeLLM

from fiddler.benchmark import report as bench_report
from fiddler.cli.calibrate import lines_of
from fiddler.cli.chat import _greet
from fiddler.cli.chat_session import Chat
from fiddler.cli.console import note
from fiddler.cli.errors import _warning
from fiddler.cli.quantize import _print
from fiddler.cli.simulate_table import print_prediction, print_verdicts
from fiddler.evaluate import report as eval_report
from fiddler.models.dtypes import Dtypes
from fiddler.quantize.run import QuantizedModel
from fiddler.speed import rates_of
from fiddler.wrapping import fitted
from offload.reference_machines import find_machine
from offload.simulation import Verdict
from tests.unit.test_benchmark_figures import record

COLUMNS = 60
NOTE = (
    "tg8, batch 2, took 2.07 times as long as predicted: everything but the CPU's experts took "
    "2,760 of a watched step's 2,780 ms, 2.85 foreseen"
)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setattr("fiddler.cli.console._width", lambda stream: COLUMNS)


def assert_fits(text: str, wide: str | None = None) -> None:
    """Lines are no longer than the terminal; their words are those of ``wide``."""
    for line in text.splitlines():
        assert len(line) <= COLUMNS or len(line.split()) == 1, line
    assert wide is None or text.split() == wide.split()


def test_calibrations_rows_are_broken_between_points() -> None:
    rates = find_machine("h200-16core").rates
    lines = lines_of(rates, COLUMNS)
    assert_fits("\n".join(lines), "\n".join(lines_of(rates)))
    assert not any(line.endswith(":") and line[-2].isdecimal() for line in lines)
    assert len(lines) > len(lines_of(rates))


def test_notes_of_benchmarks() -> None:
    records = [record(prediction_off=NOTE, model_type="A-Model-Of-30B w4g128, KV fp8 and " * 2)]
    found = bench_report.markdown(records, width=COLUMNS)
    assert_fits(found)
    assert NOTE in " ".join(found.split())
    assert_fits(bench_report.markdown([records[0], record()], width=COLUMNS))


def test_lines_below_an_evaluation() -> None:
    perplexity = SimpleNamespace(value=4.5, stderr=0.01, num_tokens=12_345)
    run = eval_report.Run(
        model="builtin",
        revision=None,
        dtypes=Dtypes("float32", "bfloat16", "float32"),
        perplexity=perplexity,  # type: ignore[arg-type]
    )
    evaluation: Any = SimpleNamespace(
        build="abc1234",
        text_name="held-out conversations",
        prepared=SimpleNamespace(window=2048, stride=1024),
        results=eval_report.Results(run=run, reference=None, divergence=None, accuracy=None),
    )
    found = eval_report.markdown(evaluation, width=COLUMNS)
    assert_fits(found)
    assert "windows of 2,048, 1,024 apart" in " ".join(found.split())


def test_notes_of_a_quantisation(capsys: pytest.CaptureFixture[str]) -> None:
    made = QuantizedModel(
        folder=Path("out"),
        nbytes=12_000_000_000,
        expert_bytes=11_000_000_000,
        bf16_expert_bytes=40_000_000_000,
        num_experts=6144,
        calibration_tokens=1000,
        least_tokens=16,
        unfitted=tuple((layer, 7) for layer in range(12)),
        layers_of={"w4g128": list(range(24)), "w8g128": list(range(24, 48))},
    )
    _print(made)
    assert_fits(capsys.readouterr().err)


def test_tables_and_notes_of_a_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    machine = find_machine("h200-16core")
    verdict = Verdict(
        policy="best static",
        num_slots=100,
        hit_rate=0.477,
        cold_bytes=843_055_104.0,
        moved_bytes=843_055_104.0,
        predicted_tokens_per_s=136.0,
        limit_tokens_per_s=190.0,
    )
    title = "olmoe-1b-7b: 90 steps of 1 token played, in a line that has more than 60 columns"
    print_verdicts({"100 of 1,024 experts": [verdict]}, title, machine.rates.peaks)
    print_prediction(rates_of(machine, why_not_own="this machine is not calibrated"), is_known=True)
    found = capsys.readouterr().out
    assert_fits("\n".join(map(str.rstrip, found.splitlines())))
    assert "copied/tok" not in found and "copied a" in found


def test_a_chats_banner_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM()
    llm.model_name = "org/A-Model-Of-30B-Instruct"  # type: ignore[misc]
    _greet(llm)  # type: ignore[arg-type]
    banner = capsys.readouterr().err
    assert_fits(banner)
    assert "A-Model-Of-30B-Instruct" in banner
    defaults = llm.default_params()
    chat = Chat(llm=llm, params=defaults, defaults=defaults)  # type: ignore[arg-type]
    system = "You are a helpful assistant who answers in one sentence, or in two."
    chat.run([f'/system """{system}\nBe kind."""', "/show", "/help", '/set stop=["one","two"]'])
    found = capsys.readouterr().out
    assert_fits(found)
    assert f"{system} Be kind." in " ".join(found.split())
    assert "Be kind." in map(str.strip, found.splitlines())


def test_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.cli.errors.error_width", lambda: COLUMNS)
    assert_fits(_warning(RuntimeWarning(NOTE)), f"warning: {NOTE}")


def test_a_note_keeps_its_words_and_lines(capsys: pytest.CaptureFixture[str]) -> None:
    note(NOTE)
    assert_fits(capsys.readouterr().err, NOTE)
    assert fitted("a  b\n\n  " + "word " * 20, 30)[:3] == ["a  b", "", "  word word word word word"]

"""The speeds that ``fiddler plan`` predicts, and by whose rates; a made-up machine."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_machine import WITH_GPU, run, set_machine

import fiddler.speed
from fiddler._version import __version__
from offload.calibration import Calibration, default_path
from offload.machine_facts import this_machine
from offload.machine_rates import RATES, MachineRates, to_json
from offload.reference_machines import find_machine, machine_of, record_of, reference_names


@pytest.fixture(autouse=True)
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, WITH_GPU)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("offload.calibration.cache_file", lambda: tmp_path / "cpu.json")
    return tmp_path / "calibration.json"


def keep(rates: MachineRates, **other: str) -> None:
    """As measured on this machine, or on one that differs in ``other``."""
    machine = this_machine(fiddler.speed.probe("auto"), __version__)
    machine = replace(machine, hardware={**machine.hardware, **other})
    Calibration(default_path(), machine).store(RATES, {}, rates)


OPTIONS = ("--shape", "qwen3-30b-a3b", "--vram-gb", "20", "--context", "8192")
H200 = find_machine("h200-16core")


def test_speeds_stand_beside_their_limits_and_say_whose_they_are(cache: Path) -> None:
    done = run(*OPTIONS)
    assert "- by the rates of rtx4090-ddr5: composed from published figures" in done.stdout
    assert "- this machine is not calibrated: fiddler calibrate" in done.stdout
    keep(H200.rates)
    done = run(*OPTIONS)
    assert re.search(r"Predicted decode at 8,192 tokens: \d\d", done.stdout)
    assert "- by this machine's rates" in done.stdout and "calibrate" not in done.stdout
    assert "by the rates" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    speeds = json.loads(run(*OPTIONS, "--json").stdout)["speeds"]
    assert speeds["machine"] == "this machine" and speeds["num_tokens"] == 8192
    for name, tokens in (("decode", 1), ("prefill", 8192)):
        terms = sum(term["seconds"] for term in speeds[name]["terms"])
        assert speeds[name]["tokens_per_s"] == pytest.approx(tokens / terms)
        assert speeds[name]["limit"] > 0


def test_a_limit_holds_where_the_cpus_own_kernels_beat_torch(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    slow_torch = replace(H200, rates=replace(H200.rates, cpu_tflops=0.1))
    path.write_text(json.dumps(record_of(slow_torch)))
    options = ("--shape", "olmoe-1b-7b", "--hardware", str(path), "--context", "1024")
    line = next(x for x in run(*options, "--device", "cpu").stdout.splitlines() if "reading" in x)
    found = re.search(r": ([\d,.]+) tok/s \(limit ([\d,]+)\)", line)
    assert found is not None
    predicted, limit = (float(figure.replace(",", "")) for figure in found.groups())
    assert 0 < predicted < limit


def test_a_batch_is_planned_for_and_predicted(cache: Path) -> None:
    options = ("--shape", "olmoe-1b-7b", "--context", "2048", "--batch", "4")
    done = run(*options)
    assert "Predicted decode of 4 requests at 2,048 tokens" in done.stdout
    speeds = json.loads(run(*options, "--json").stdout)["speeds"]
    assert (speeds["batch"], speeds["num_tokens"]) == (4, 2048)
    step_s = sum(term["seconds"] for term in speeds["decode"]["terms"])
    assert speeds["decode"]["tokens_per_s"] == pytest.approx(4 / step_s)
    crowded = run("--shape", "qwen3-30b-a3b", "--context", "30000", "--batch", "9")
    assert "the KV cache has room for 1 of 9 requests of 30,000 tokens" in crowded.stdout


def test_a_plan_says_what_it_was_chosen_for_and_by_whom(cache: Path) -> None:
    plans = {}
    for objective in ("decode", "prefill"):
        done = run(*OPTIONS, "--objective", objective)
        assert re.search(rf"Steps of [\d,]+ tokens.*: best of \d+ for {objective}", done.stdout)
        record = json.loads(run(*OPTIONS, "--objective", objective, "--json").stdout)
        plans[objective] = record["plan"]
        assert plans[objective]["chosen"]["objective"] == objective
        assert plans[objective]["chosen"]["machine"] == "rtx4090-ddr5"
    assert plans["decode"]["step_tokens"] < plans["prefill"]["step_tokens"]
    everything = json.loads(run("--shape", "olmoe-1b-7b", "--json").stdout)
    assert everything["plan"]["chosen"] is None and everything["context_price"] is None


def test_what_context_costs_and_what_would_help_is_said_everywhere(
    cache: Path, tmp_path: Path
) -> None:
    page = tmp_path / "plan.html"
    done = run(*OPTIONS[:4], "--html", str(page))
    record = json.loads(run(*OPTIONS[:4], "--json").stdout)
    said = " ".join(ET.fromstring(page.read_text().partition("\n")[2]).itertext())
    price = record["context_price"]
    sentence = f"1,024 more tokens of context take the room of {price['experts']:.1f} experts"
    assert sentence in done.stdout and sentence in said
    assert 0 < record["pulled_share_of_cold_experts"] < 1
    assert "Cold experts of a decode step: " in done.stdout
    assert "--dtype bf12" in done.stdout
    for way in record["faster"]:
        assert way["option"] in done.stdout and way["option"] in said and way["cost"] in said
        before = way["tokens_per_s_before"]["decode"]
        assert before == pytest.approx(record["speeds"]["decode"]["tokens_per_s"])
    for name in ("VRAM 20.0 GiB", "RAM "):
        assert any(line.startswith(name) and line.endswith("|") for line in done.stdout.split("\n"))


def test_a_calibration_of_another_machine_is_not_taken_for_ones_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fiddler.cli.calibrate.measure", interrupted)
    keep(H200.rates, cpu_name="Other CPU")
    done = run(*OPTIONS, "--json")
    assert "of another machine (Other CPU with Test GPU): calibrating" in done.stderr
    assert done.stderr.endswith("not calibrated\n")
    speeds = json.loads(done.stdout)["speeds"]
    assert speeds["machine"] == "rtx4090-ddr5"
    assert speeds["why_not_this_machine"].endswith("of another machine (Other CPU with Test GPU)")


def test_a_calibration_without_all_kernels_is_not_planned_by(cache: Path) -> None:
    keep(replace(H200.rates, times=H200.rates.times[:2]))
    speeds = json.loads(run(*OPTIONS, "--json").stdout)["speeds"]
    assert speeds["machine"] == "rtx4090-ddr5"
    assert "no kernel for" in speeds["why_not_this_machine"]


def test_a_damaged_calibration_is_said(cache: Path) -> None:
    cache.write_text("{")
    with pytest.warns(RuntimeWarning, match=r"calibration.json cannot be used"):
        done = run(*OPTIONS)
    assert done.exit_code == 0 and "this machine is not calibrated" in done.stdout


def test_an_implausible_calibration_is_said_and_not_planned_by(cache: Path) -> None:
    keep(H200.rates)
    text = cache.read_text()
    read = f'"cpu_read_gbps": {H200.rates.peaks.cpu_read_gbps}'
    assert text.count(read) == 1
    cache.write_text(text.replace(read, '"cpu_read_gbps": 1e300'))
    with pytest.warns(RuntimeWarning, match=r"cannot be used .*1e\+300.* measured anew"):
        speeds = json.loads(run(*OPTIONS, "--json").stdout)["speeds"]
    assert speeds["machine"] == "rtx4090-ddr5"
    assert speeds["why_not_this_machine"].endswith("calibration.json has of it cannot be used")
    keep(H200.rates)
    assert cache.read_text() == text


def test_a_plan_for_another_machine(cache: Path, tmp_path: Path) -> None:
    done = run("--shape", "mixtral-8x7b", "--hardware", "rtx4090-ddr5")
    assert done.exit_code == 0, done.output
    assert "NVIDIA GeForce RTX 4090, 23.0 GiB of VRAM" in done.stdout
    assert "by the rates of rtx4090-ddr5" in done.stdout and "calibrate" not in done.stdout
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(record_of(replace(H200, name="mine", origin="made up"))))
    done = run("--shape", "mixtral-8x7b", "--hardware", str(path), "--vram-gb", "24")
    assert "NVIDIA H200, 24.0 GiB" in done.stdout and "rates of mine: made up" in done.stdout
    done = run("--shape", "mixtral-8x7b", "--hardware", str(path), "--device", "cpu")
    assert "RAM" in done.stdout and "NVIDIA" not in done.stdout


@pytest.mark.parametrize(
    "damage",
    [
        *({"format": 2}, {"rates": {}}, {"hardware": {}}, {"hardware": None}, {"name": None}),
        {"rates": to_json(replace(H200.rates, times=H200.rates.times[:2]))},
    ],
)
def test_a_damaged_machine_is_one_sentence(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = tmp_path / "mine.json"
    record = record_of(H200) | damage
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    done = run("--shape", "mixtral-8x7b", "--hardware", str(path))
    assert done.exit_code == 1 and "cannot be used as a machine" in done.stderr
    assert "fiddler calibrate --output" in done.stderr


def numbers_in(record: Any) -> list[tuple[Any, Any]]:
    """Where the record has numbers: (dictionary or list, key)."""
    items = record.items() if isinstance(record, dict) else enumerate(record)
    found = []
    for key, value in items:
        if isinstance(value, dict | list):
            found += numbers_in(value)
        elif isinstance(value, int | float):
            found.append((record, key))
    return found


NUMBERS = len(numbers_in(json.loads(json.dumps(record_of(H200)["rates"]))))


@pytest.mark.parametrize("damage", [-7, -0.5, 1e300, float("nan"), float("inf"), "x", None, [1]])
@given(data=st.data())
def test_no_number_of_the_rates_may_be_implausible(damage: Any, data: st.DataObject) -> None:
    record = json.loads(json.dumps(record_of(H200)))
    where, key = numbers_in(record["rates"])[data.draw(st.integers(0, NUMBERS - 1))]
    where[key] = damage
    with pytest.raises(ValueError):
        machine_of(record)


@pytest.mark.parametrize(
    ("part", "field", "value", "why"),
    [
        ("hardware", "physical_cores", 0, "a core or more"),
        ("hardware", "physical_cores", "8", "a core or more"),
        ("hardware", "gpu_capability", ["9", 0], "two whole numbers"),
        ("hardware", "gpu_capability", [9], "two whole numbers"),
        ("hardware", "vram_free_bytes", -1, "sizes of memory"),
        ("hardware", "has_gpu", False, "agree about a GPU"),
        ("rates", "num_threads", "x", "whole numbers"),
        ("rates", "num_threads", 0, "whole numbers"),
        ("rates", "call_s", 0.0, "from 1e-10"),
    ],
)
def test_what_a_machine_cannot_be_is_refused(part: str, field: str, value: Any, why: str) -> None:
    record = json.loads(json.dumps(record_of(H200)))
    record[part][field] = value
    with pytest.raises(ValueError, match=why):
        machine_of(record)


@pytest.mark.parametrize("name", reference_names())
def test_shipped_machines_are_what_they_say(name: str) -> None:
    machine = find_machine(name)
    assert machine.name == name and machine.origin and machine.rates.has_gpu
    assert machine_of(json.loads(json.dumps(record_of(machine)))) == machine

"""``fiddler doctor``: what findings cost in tokens a second."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from doctor_machines import GIB, keep_in
from hypothesis import given
from hypothesis import strategies as st

from fiddler._version import __version__
from fiddler.cli import cli, doctor_facts
from fiddler.cli.doctor import cost_text
from fiddler.cli.doctor_cost import cost_of, mended_rates, whole_rates
from fiddler.cli.doctor_problem import Cost, Mend
from fiddler.speed import RatesHere
from offload.calibration import Calibration, default_path
from offload.hardware import Hardware
from offload.machine_facts import this_machine
from offload.machine_rates import RATES
from offload.reference_machines import find_machine

RTX = find_machine("rtx4090-ddr5")
GAINS = [
    Mend(link=4.0),
    Mend(memory=2.0),
    Mend(hand_over_s=24e-6),
    Mend(vram_bytes=6 * GIB),
    Mend(ram_bytes=70 * GIB),
]


@pytest.mark.parametrize("name", ["", RTX.name])
@pytest.mark.parametrize("mend", GAINS)
def test_what_is_mended_is_faster(mend: Mend, name: str) -> None:
    """By a machine's own rates, which are those of now, and by another's, which are in order."""
    hardware = replace(
        RTX.hardware,
        vram_free_bytes=12 * GIB,
        ram_available_bytes=RTX.hardware.ram_available_bytes - mend.ram_bytes,
    )
    rates = replace(RTX.rates, hand_over_s=3e-5)
    cost = cost_of(mend, hardware, RatesHere(rates=rates, name=name, origin=""))
    assert cost is not None
    assert (cost.shape, cost.machine) == ("qwen3-30b-a3b", name or "this machine")
    before, after = (cost.decode, cost.prefill), (cost.mended_decode, cost.mended_prefill)
    assert all(a >= 0.999 * b for a, b in zip(after, before, strict=True))
    assert any(a > 1.02 * b for a, b in zip(after, before, strict=True))


def test_fewer_instructions_cost_what_two_calibrations_say() -> None:
    fewer = RatesHere(rates=mended_rates(RTX.rates, Mend(memory=0.5)), name="", origin="")
    mend = Mend(all_instructions=True)
    cost = cost_of(mend, RTX.hardware, fewer, RTX.rates)
    assert cost is not None and cost.mended_decode > 1.2 * cost.decode
    assert cost_of(mend, RTX.hardware, fewer, None) is None
    assert cost_of(mend, RTX.hardware, replace(fewer, name=RTX.name), RTX.rates) is None


def test_rates_with_all_instructions_are_those_kept_without_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_in(tmp_path, monkeypatch)
    machine = this_machine(RTX.hardware, __version__)
    Calibration(default_path(), machine).store(RATES, {}, RTX.rates)
    lesser = replace(machine, hardware={**machine.hardware, "FIDDLER_ISA": "plain"})
    slow = mended_rates(RTX.rates, Mend(memory=0.5))
    Calibration(default_path(), lesser).store(RATES, {}, slow)
    monkeypatch.setattr("fiddler.cli.doctor_cost.this_machine", lambda *of: lesser)
    assert whole_rates(RTX.hardware) == RTX.rates


factors = st.floats(0.1, 10.0)


@given(factors, factors, st.floats(-1e-5, 1e-5))
def test_rates_are_mended_in_proportion_and_back(
    link: float, memory: float, hand_over_s: float
) -> None:
    rates = replace(RTX.rates, hand_over_s=2e-5)
    mended = mended_rates(rates, Mend(link=link, memory=memory, hand_over_s=hand_over_s))
    assert mended.pull_gbps == pytest.approx(rates.pull_gbps * link)
    expert_s = mended.expert_s("bf16", "f32", 10_000_000)(1, False)
    assert expert_s == pytest.approx(rates.expert_s("bf16", "f32", 10_000_000)(1, False) / memory)
    back = Mend(link=1 / link, memory=1 / memory, hand_over_s=-hand_over_s)
    again = mended_rates(mended, back)
    assert again.peaks.cpu_read_gbps == pytest.approx(rates.peaks.cpu_read_gbps)
    assert again.hand_over_s == pytest.approx(rates.hand_over_s)


def test_no_shape_that_fits_is_no_cost() -> None:
    small = replace(RTX.hardware.without_gpu(), ram_total_bytes=2 * GIB, ram_available_bytes=GIB)
    used = RatesHere(rates=RTX.rates, name="", origin="")
    assert cost_of(Mend(memory=1.03), small, used) is None


@pytest.mark.parametrize("text", [None, "{"])
def test_costs_stand_beside_the_finding(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Huge pages switched off, as they may be anywhere; on a machine that is not calibrated."""
    looks = {"memory": lambda: {"huge_pages": "never"}, "rates": doctor_facts.LOOKS["rates"]}
    monkeypatch.setattr(doctor_facts, "LOOKS", looks)
    probed = []

    def probe(device: str = "auto") -> Hardware:
        probed.append(device)
        return RTX.hardware

    monkeypatch.setattr("offload.hardware.probe", probe)
    keep_in(tmp_path, monkeypatch)
    if text is not None:  # which is a finding, and said nowhere else
        default_path().parent.mkdir()
        default_path().write_text(text)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.stderr == ""
    assert probed == ["auto"]  # one look tells what is wrong and what it costs
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  speed: "))
    found = re.match(r"  speed: writes ([\d.]+) tok/s instead of ([\d.]+), reads ", line)
    assert found is not None and 0.95 < float(found[1]) / float(found[2]) < 1
    record = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert "seen" not in record
    (cost,) = filter(None, (problem["cost"] for problem in record["problems"]))
    assert cost["shape"] == "qwen3-30b-a3b"
    assert cost["decode"] == pytest.approx(float(found[1]), rel=0.01)


def test_only_what_differs_is_said_twice() -> None:
    cost = Cost(
        shape="s", machine="m", decode=9.0, mended_decode=12.0, prefill=800.0, mended_prefill=800.1
    )
    said = "writes 9.0 tok/s instead of 12.0, reads 800 tok/s (s, by the rates of m)"
    assert cost_text(cost) == said

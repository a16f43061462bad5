"""``fiddler plan`` as a user runs it: tables, JSON, refusals; a made-up machine below."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import fiddler.speed
from fiddler._version import __version__
from fiddler.cli import cli
from fiddler.hub import ModelFolder, ModelMetadata
from offload.calibration import Calibration, default_path
from offload.hardware import Hardware
from offload.layout import LEAST_CONTEXT, MOST_CONTEXT
from offload.machine_facts import this_machine
from offload.machine_rates import RATES, MachineRates, to_json
from offload.objective import DEFAULT
from offload.reference_machines import find_machine, machine_of, record_of, reference_names

GIB = 1 << 30


@pytest.fixture(autouse=True)
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Hardware(
        has_gpu=True,
        gpu_name="Test GPU",
        vram_total_bytes=24 * GIB,
        vram_free_bytes=23 * GIB,
        cuda_context_bytes=GIB // 2,
        ram_total_bytes=128 * GIB,
        ram_available_bytes=120 * GIB,
        physical_cores=8,
        cpu_name="Test CPU",
    )
    set_machine(monkeypatch, machine)


def set_machine(monkeypatch: pytest.MonkeyPatch, machine: Hardware) -> None:
    for module in ("offload.hardware", "fiddler.speed"):
        monkeypatch.setattr(f"{module}.probe", lambda device: machine)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_a_shape_is_planned_in_45_lines_that_fit_a_terminal() -> None:
    done = run("--shape", "qwen3-30b-a3b", "--vram-gb", "20", "--context", "8192")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80
    words = " ".join(done.stdout.split())
    assert "qwen3-30b-a3b: 48 layers, 128 experts, 8 for each token; bfloat16" in words
    assert "Test GPU, 20.0 GiB of VRAM" in words
    assert "Context of one request: 8,192 tokens" in words
    assert "no profile: every expert counts the same" in words


@pytest.mark.parametrize("more", [(), ("--batch", "64"), ("--ram-gb", "16"), ("--context", "99")])
def test_no_line_ends_in_blanks(more: tuple[str, ...]) -> None:
    lines = run("--shape", "qwen3-30b-a3b", "--vram-gb", "20", *more).stdout.splitlines()
    assert "What lives where" in "".join(lines)
    assert not [line for line in lines if line != line.rstrip()]


def test_the_plan_in_the_readme_is_printed_so() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.search(r"```text\n\$ fiddler plan (.*)\n([^`]*)```", text)
    assert shown and run(*shown[1].split()).stdout == shown[2]


def test_the_context_is_told_without_a_gpu_side_too(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Hardware(
        has_gpu=False,
        gpu_name=None,
        vram_total_bytes=0,
        vram_free_bytes=0,
        cuda_context_bytes=0,
        ram_total_bytes=128 * GIB,
        ram_available_bytes=120 * GIB,
        physical_cores=8,
        cpu_name="Test CPU",
    )
    set_machine(monkeypatch, machine)
    done = run("--shape", "olmoe-1b-7b", "--context", "2048")
    assert done.exit_code == 0, done.output
    assert "Context of one request: 2,048 tokens" in done.stdout
    assert "GPU side" not in done.stdout


def test_json_holds_the_same_plan_and_adds_up() -> None:
    done = run("--shape", "mixtral-8x7b", "--vram-gb", "22", "--json")
    record = json.loads(done.stdout)
    plan = record["plan"]
    resident = sum(map(len, plan["placement"]))
    expert_bytes = 3 * 4096 * 14336 * 2
    assert plan["memory"]["gpu_experts"] == resident * expert_bytes
    elsewhere = ("cpu_experts", "disk_experts")
    on_gpu = sum(size for name, size in plan["memory"].items() if name not in elsewhere)
    assert on_gpu == plan["vram_budget_bytes"] == 22 * GIB
    assert record["hardware"]["gpu_name"] == "Test GPU"
    assert (
        f"experts, {resident:,} + {256 - resident:,}"
        in run("--shape", "mixtral-8x7b", "--vram-gb", "22").stdout
    )


def test_what_ram_has_no_room_for_is_shown_on_disk() -> None:
    options = ("--shape", "qwen3-30b-a3b", "--vram-gb", "20", "--ram-gb", "16")
    done = run(*options)
    lines = done.stdout.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80, done.stdout
    plan = json.loads(run(*options, "--json").stdout)["plan"]
    on_gpu, in_ram = (sum(map(len, plan[name])) for name in ("placement", "cached"))
    assert in_ram == 16 * GIB // (3 * 2048 * 768 * 2)
    words = " ".join(done.stdout.split())
    assert "What lives where GPU CPU disk" in words
    assert f"experts, {on_gpu:,} + {in_ram:,} + {48 * 128 - on_gpu - in_ram:,}" in words
    assert f"RAM holds {in_ram:,} experts at a time" in words and "without CUDA graphs" in words
    assert plan["memory"]["disk_experts"] == (48 * 128 - on_gpu - in_ram) * 3 * 2048 * 768 * 2
    assert 0 < plan["per_token"]["disk_experts"] < plan["per_token"]["cold_experts"]


def test_a_hub_model_is_planned_from_its_metadata(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from fiddler.models.shapes import SHAPES

    (tmp_path / "config.json").write_text(json.dumps(SHAPES["olmoe-1b-7b"]))
    asked: dict[str, Any] = {}

    def fetch_metadata(model: str, **options: Any) -> ModelMetadata:
        asked.update(options, model=model)
        return ModelMetadata(ModelFolder(tmp_path, "org/olmoe", "c0ffee"), 13 * GIB, 13 * GIB)

    monkeypatch.setattr("fiddler.hub.fetch_metadata", fetch_metadata)
    done = run("org/olmoe", "--revision", "main", "--offline", "--token", "t")
    assert done.exit_code == 0, done.output
    assert asked == {"model": "org/olmoe", "revision": "main", "offline": True, "token": "t"}
    assert "13.0 GiB are still to be downloaded" in done.stdout
    assert json.loads(run("org/olmoe", "--json").stdout)["revision"] == "c0ffee"


def test_a_page_shows_every_byte(tmp_path: Any) -> None:
    path = tmp_path / "plan.html"
    options = ("--shape", "qwen3-30b-a3b", "--vram-gb", "20", "--ram-gb", "16")
    done = run(*options, "--html", str(path))
    assert done.exit_code == 0, done.output
    assert f"wrote {path}" in done.stderr and "What lives where" in done.stdout
    root = ET.fromstring(path.read_text().partition("\n")[2])
    said = " ".join(root.itertext())
    assert (
        "VRAM of Test GPU, 20.0 GiB" in said
        and "RAM, 16.0 GiB of 16.0 GiB" in said
        and "Disk, " in said
    )
    assert run(*options, "--html", str(path)).exit_code == 0  # its own page may be replaced
    path.write_text("my notes")
    refused = run(*options, "--html", str(path))
    assert refused.exit_code == 1 and "is not a page of fiddler" in refused.stderr
    assert path.read_text() == "my notes"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "error: a plan needs either a model or --shape NAME"),
        (
            ("builtin", "--shape", "mixtral-8x7b"),
            "error: both a model, builtin, and --shape mixtral-8x7b were given",
        ),
        (("mixtral-8x7b",), "fiddler plan --shape mixtral-8x7b"),
        (("--shape", "mixtral"), "did you mean 'mixtral-8x7b'?"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "0"), "before any expert, but has 0 B"),
        (("--shape", "mixtral-8x7b", "--ram-gb", "0"), "of RAM, but 0 B may be used"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "3"), "before any expert, but has 3.0 GiB"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "80"), "23.5 GiB of the 24.0 GiB"),
        (("--shape", "mixtral-8x7b", "--ram-gb", "0.1"), "of RAM, but 102 MiB may be used"),
        (("--shape", "mixtral-8x7b", "--context", "40000"), "the model's ends at 32,768"),
        (("--shape", "mixtral-8x7b", "--batch", "0"), "use --batch 1 or more"),
        (("--shape", "mixtral-8x7b", "--batch", "-3"), "a batch of -3 requests cannot be"),
        (("--shape", "mixtral-8x7b", "--objective", "decod"), "did you mean 'decode'?"),
        (("--shape", "mixtral-8x7b", "--objective", "mix:0:0"), "of 'mix:0:0' has no tokens"),
        (
            ("--shape", "mixtral-8x7b", "--objective", "mix:1"),
            "use decode, prefill, mix or mix:P:N",
        ),
        (("--shape", "mixtral-8x7b", "--profile", "/none"), "cannot be read: No such file"),
        (("--shape", "mixtral-8x7b", "--hardware", "rtx409"), "did you mean 'rtx4090-ddr5'?"),
        (("--shape", "mixtral-8x7b", "--hardware", "README.md"), "cannot be used as a machine"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("budget", ["23.6", "24", "80"])
def test_more_than_a_card_gives_is_refused_with_two_ways_that_work(budget: str) -> None:
    refused = run("--shape", "qwen3-30b-a3b", "--vram-gb", budget)
    hint = refused.stderr.partition("hint: ")[2]
    assert refused.exit_code == 1 and "or leave it out" in hint
    most = re.findall(r"--vram-gb ([\d.]+)", hint)
    for arguments in (("--vram-gb", *most), ()):
        assert run("--shape", "qwen3-30b-a3b", *arguments).exit_code == 0


@pytest.mark.parametrize("name", ["README.md", "evaluation.md", "planning.md", "timeline.md"])
def test_commands_shown_for_ones_own_card_run_on_one_of_24_gb(name: str) -> None:
    folder = Path(__file__).parents[2]
    text = (folder / name if name == "README.md" else folder / "docs" / name).read_text()
    shown = re.findall(r"fiddler (?:chat|plan|bench|eval|generate)\b.*--vram-gb (\d+)", text)
    assert all(int(gib) <= 23 for gib in shown), shown


def test_what_is_said_of_an_unasked_context_is_so() -> None:
    bounds = [f"{tokens:,}" for tokens in (LEAST_CONTEXT, MOST_CONTEXT)]
    help_text = CliRunner().invoke(cli, ["plan", "--help"], terminal_width=200).stdout
    for text in (
        next(line for line in help_text.splitlines() if "--context" in line),
        (Path(__file__).parents[2] / "docs" / "planning.md").read_text(),
    ):
        assert all(bound in text for bound in bounds), text
    roomy = json.loads(run("--shape", "qwen3-30b-a3b", "--dtype", "w4g128", "--json").stdout)
    assert roomy["plan"]["context_tokens"] == MOST_CONTEXT
    tight = json.loads(run("--shape", "mixtral-8x7b", "--vram-gb", "5", "--json").stdout)
    assert tight["plan"]["context_tokens"] == LEAST_CONTEXT


@pytest.mark.parametrize("objective", ["mix", "mix:4096:512"])
def test_figures_in_the_docs_are_those_that_plan_prints(objective: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    options = ("--shape", "qwen3-30b-a3b", "--hardware", "rtx4090-ddr5", "--objective", objective)
    stdout = run(*options, "--context", "4096").stdout
    for rate in re.findall(r"Predicted .*: ([\d.,]+) tok/s", stdout):
        assert rate in text
    if objective == DEFAULT:
        price = re.search(r"1,024 more tokens .* tok/s", run(*options).stdout)
        assert price and price[0] in text


# --- speeds ---


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


def test_a_prompt_faster_than_its_limit_names_what_limits_there(tmp_path: Path) -> None:
    """Without a GPU that is products or memory, and no PCIe."""
    path = tmp_path / "slow.json"
    slow_torch = replace(H200, rates=replace(H200.rates, cpu_tflops=0.1))
    path.write_text(json.dumps(record_of(slow_torch)))
    options = ("--shape", "olmoe-1b-7b", "--hardware", str(path), "--context", "1024")
    line = next(x for x in run(*options, "--device", "cpu").stdout.splitlines() if "reading" in x)
    assert "(products alone: " in line
    options = ("--shape", "qwen3-30b-a3b", "--hardware", "rtx4090-ddr5")
    assert "(PCIe alone: " in run(*options).stdout


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
    assert "--dtype w4g128" in done.stdout
    for way in record["faster"]:
        assert way["option"] in done.stdout and way["option"] in said and way["cost"] in said
        before = way["tokens_per_s_before"]["decode"]
        assert before == pytest.approx(record["speeds"]["decode"]["tokens_per_s"])
    for name in ("VRAM 20.0 GiB", "RAM "):
        assert any(line.startswith(name) and line.endswith("|") for line in done.stdout.split("\n"))


def test_a_calibration_of_another_machine_is_not_taken_for_ones_own(cache: Path) -> None:
    keep(H200.rates, cpu_name="Other CPU")
    done = run(*OPTIONS, "--json")
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


@pytest.mark.parametrize("name", reference_names())
def test_shipped_machines_are_what_they_say(name: str) -> None:
    machine = find_machine(name)
    assert machine.name == name and machine.origin and machine.rates.has_gpu
    assert machine_of(json.loads(json.dumps(record_of(machine)))) == machine

"""``fiddler plan`` as a user runs it: tables, JSON, refusals; a made-up machine."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from plan_machine import GIB, WITH_GPU, run, set_machine

from fiddler.cli import cli
from fiddler.hub import ModelFolder, ModelMetadata
from offload.hardware import Hardware
from offload.layout import LEAST_CONTEXT, MOST_CONTEXT
from offload.objective import DEFAULT
from offload.popularity import Popularity, Profile, save_profile


@pytest.fixture(autouse=True)
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, WITH_GPU)


def test_a_shape_is_planned_in_45_lines_that_fit_a_terminal() -> None:
    done = run("--shape", "qwen3-30b-a3b", "--vram-gb", "20", "--context", "8192")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) <= 46
    assert max(map(len, lines)) <= 80
    words = " ".join(done.stdout.split())
    assert "qwen3-30b-a3b: 48 layers, 128 experts, 8 for each token; bfloat16" in words
    assert "Test GPU, 20.0 GiB of VRAM" in words
    assert "Context of one request: 8,192 tokens" in words
    assert "no profile: every expert counts the same" in words


@pytest.mark.parametrize("more", [(), ("--ram-gb", "16")])
@pytest.mark.parametrize("width", [50, 65, 80])
def test_a_narrow_terminal_shows_all_columns(
    more: tuple[str, ...], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run("--shape", "qwen3-30b-a3b", "--vram-gb", "20", *more).stdout.splitlines()
    assert max(map(len, lines)) <= width
    ends = ["GPU", "CPU", *(["disk"] if more else [])]
    assert sum(line.split()[-len(ends) :] == ends for line in lines) == 2
    [total] = [line.split() for line in lines if line.startswith("total")]
    assert total[2::2] == ["GiB"] * len(ends)
    assert all(line.endswith("|") for line in lines if line.startswith(("VRAM", "RAM", "Disk")))


@pytest.mark.parametrize("more", [(), ("--batch", "64"), ("--ram-gb", "16"), ("--context", "99")])
def test_no_line_ends_in_blanks(more: tuple[str, ...]) -> None:
    lines = run("--shape", "qwen3-30b-a3b", "--vram-gb", "20", *more).stdout.splitlines()
    assert "What lives where" in "".join(lines)
    assert not [line for line in lines if line != line.rstrip()]


def test_the_plan_in_the_readme_is_printed_so() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    shown = re.search(r"```text\n\$ fiddler plan (.*)\n([^`]*)```", text)
    assert shown and run(*shown[1].split()).stdout == shown[2]


def test_speeds_in_the_readme_for_a_card_of_24_gb_are_those_that_plan_prints() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = re.findall(r"^\| `(--shape .*)` \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == 7
    for options, ram, decode, prompt in rows:
        printed = run(*options.split(), "--hardware", "rtx4090-ddr5").stdout
        assert f"Predicted decode at 1,024 tokens: {decode} tok/s" in printed, options
        assert f"Predicted reading of a prompt of as many: {prompt} tok/s" in printed, options
        [total] = re.findall(r"^total +23\.0 GiB *(.*)$", printed, re.MULTILINE)
        assert total == ram, options


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
    elsewhere = ("cpu_dense", "cpu_workspace", "cpu_experts", "disk_experts")
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
    assert len(lines) <= 46 and max(map(len, lines)) <= 80, done.stdout
    plan = json.loads(run(*options, "--json").stdout)["plan"]
    on_gpu, in_ram = (sum(map(len, plan[name])) for name in ("placement", "cached"))
    room = 16 * GIB - plan["memory"]["cpu_workspace"] - plan["memory"]["cpu_dense"]
    assert in_ram == room // (3 * 2048 * 768 * 2) < 16 * GIB // (3 * 2048 * 768 * 2)
    words = " ".join(done.stdout.split())
    assert "What lives where GPU CPU disk" in words
    assert f"experts, {on_gpu:,} + {in_ram:,} + {48 * 128 - on_gpu - in_ram:,}" in words
    assert f"RAM holds {in_ram:,} experts at a time" in words and "without CUDA graphs" in words
    assert plan["memory"]["disk_experts"] == (48 * 128 - on_gpu - in_ram) * 3 * 2048 * 768 * 2
    assert 0 < plan["per_token"]["disk_experts"] < plan["per_token"]["cold_experts"]


@pytest.mark.parametrize("kind", ["auto", "bf12", "w4g128"])
def test_what_is_read_from_disk_is_what_is_stored(kind: str) -> None:
    options = ("--shape", "qwen3-30b-a3b", "--vram-gb", "6", "--ram-gb", "4", "--dtype", kind)
    plan = json.loads(run(*options, "--json").stdout)["plan"]
    experts = 48 * 128 - sum(map(len, plan["placement"])) - sum(map(len, plan["cached"]))
    in_memory = plan["memory"]["disk_experts"] / experts
    read = plan["per_token"]
    assert read["disk_reads"] / read["disk_experts"] == pytest.approx(
        3 * 2048 * 768 * 2 / in_memory
    )
    packed = [note for note in plan["notes"] if f"quantize --scheme {kind}" in note]
    assert len(packed) == (kind != "auto")


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
    crowded = run(*options, "--context", "4096", "--batch", "64", "--html", str(path))
    assert crowded.exit_code == 0  # its own page may be replaced
    assert "others wait" in crowded.stdout and "others wait" in path.read_text()
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
        (("--shape", "Qwen/Qwen3-30B-A3B"), "did you mean 'qwen3-30b-a3b'?"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "0"), "before any expert, but has 0 B"),
        (("--shape", "mixtral-8x7b", "--ram-gb", "0"), "of RAM, but 0 B may be used"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "3"), "before any expert, but has 3.0 GiB"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "80"), "23.5 GiB of the 24.0 GiB"),
        (("--shape", "mixtral-8x7b", "--ram-gb", "0.1"), "of RAM, but 102 MiB may be used"),
        (("--shape", "mixtral-8x7b", "--ram-gb", "1e300"), "0 or more GiB, not 1e+300"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "1e300"), "0 or more GiB, not 1e+300"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "1e299"), "23.5 GiB of the 24.0 GiB"),
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
        (("--shape", "mixtral-8x7b", "--revision", "v1"), "--revision is for models of the hub"),
        (("--shape", "mixtral-8x7b", "--token", "t"), "--token is for models of the hub"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stdout == ""


def test_a_profile_that_chooses_nothing_is_said(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(1, 99, (16, 64))
    profile = Profile(
        model="olmoe-1b-7b",
        architecture=None,
        revision=None,
        corpus_sha256="text",
        num_tokens=1000,
        popularity=Popularity(counts),
        created="now",
    )
    save_profile(profile, tmp_path / "p.json")
    shape = ("--shape", "olmoe-1b-7b", "--profile", str(tmp_path / "p.json"))
    sentence = "- the profile changes nothing: all experts are in one memory"
    no_gpu = ("--hardware", "rtx4090-ddr5", "--device", "cpu")
    for same in ((), no_gpu, ("--vram-gb", "2.1")):
        assert sentence in run(*shape, *same).stdout, same
    for split in (("--vram-gb", "6"), (*no_gpu, "--ram-gb", "8")):
        assert "changes nothing" not in run(*shape, *split).stdout, split
    assert "changes nothing" not in run(*shape[:2]).stdout


@pytest.mark.parametrize("budget", ["23.6", "24", "80"])
def test_more_than_a_card_gives_is_refused_with_two_ways_that_work(budget: str) -> None:
    refused = run("--shape", "qwen3-30b-a3b", "--vram-gb", budget)
    hint = refused.stderr.partition("hint: ")[2]
    assert refused.exit_code == 1 and "or leave it out" in hint
    most = re.findall(r"--vram-gb ([\d.]+)", hint)
    for arguments in (("--vram-gb", *most), ()):
        assert run("--shape", "qwen3-30b-a3b", *arguments).exit_code == 0


@pytest.mark.parametrize(
    "name", ["README.md", "evaluation.md", "planning.md", "profiles.md", "timeline.md"]
)
def test_commands_shown_for_ones_own_card_run_on_one_of_24_gb(name: str) -> None:
    folder = Path(__file__).parents[2]
    text = (folder / name if name == "README.md" else folder / "docs" / name).read_text()
    shown = re.findall(
        r"fiddler (?:chat|plan|simulate|bench|eval|generate)\b.*--vram-gb (\d+)", text
    )
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

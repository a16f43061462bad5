"""``fiddler plan`` as a user runs it: tables, JSON, refusals; a made-up machine below."""

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fiddler.cli import cli
from fiddler.hub import ModelFolder, ModelMetadata
from offload.hardware import Hardware

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
    monkeypatch.setattr("offload.hardware.probe", lambda device: machine)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_a_shape_is_planned_in_25_lines_that_fit_a_terminal() -> None:
    done = run("--shape", "qwen3-30b-a3b", "--vram-gb", "20", "--context", "8192")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    words = " ".join(done.stdout.split())
    assert "qwen3-30b-a3b: 48 layers, 128 experts, 8 for each token; bfloat16" in words
    assert "Test GPU, 20.0 GiB of VRAM" in words
    assert "Context of one request: 8,192 tokens" in words
    assert "no profile: every expert counts the same" in words


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
    monkeypatch.setattr("offload.hardware.probe", lambda device: machine)
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
    assert len(lines) <= 28 and max(map(len, lines)) <= 80, done.stdout
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
        (("builtin", "--shape", "mixtral-8x7b"), "error: a plan needs either a model or --shape"),
        (("mixtral-8x7b",), "fiddler plan --shape mixtral-8x7b"),
        (("--shape", "mixtral"), "did you mean 'mixtral-8x7b'?"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "3"), "before any expert, but has 3.0 GiB"),
        (("--shape", "mixtral-8x7b", "--vram-gb", "80"), "23.5 GiB of the 24.0 GiB"),
        (("--shape", "mixtral-8x7b", "--ram-gb", "0.1"), "of RAM, but 102 MiB may be used"),
        (("--shape", "mixtral-8x7b", "--context", "40000"), "the model's ends at 32,768"),
        (("--shape", "mixtral-8x7b", "--profile", "/none"), "cannot be read: No such file"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert done.stdout == ""

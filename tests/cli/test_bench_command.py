"""``fiddler bench`` on the built-in model: figures that agree with each other, and refusals."""

import csv
import io
import json
import os
import statistics
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from fiddler.benchmark.cases import Case
from fiddler.benchmark.tally import Tally
from fiddler.cli import cli
from fiddler.models.shapes import SHAPES
from offload.limits import Peaks
from offload.reference_machines import find_machine
from tests.timelines import assert_nested, rows_of

LLAMA_BENCH = {
    *("build_commit", "cpu_info", "gpu_info", "model_type", "model_size", "model_n_params"),
    *("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts"),
    *("samples_ns", "samples_ts", "n_threads", "type_k", "type_v"),
    *("backends", "model_filename", "n_batch", "n_ubatch"),
}
OURS = {
    *("n_parallel", "routing", "placement", "n_gpu_experts", "n_disk_experts", "hit_rate"),
    *("routing_entropy",),
    *("median_ts", "cpu_gbps", "pcie_gbps", "gpu_gbps", "peak_vram_bytes", "limit_ts", "ratio"),
    *("peak_cpu_read_gbps", "peak_joint_gbps", "peak_pcie_gbps", "peak_gpu_read_gbps"),
    *("peak_gemm_tflops", "predicted_ts", "predicted_terms", "prediction_off"),
}
NS = 1_000_000_000
NO_GPU = {"joint_gbps": 10.0, "pcie_gbps": 0.0, "gpu_read_gbps": 0.0}
PEAKS = Peaks(cpu_read_gbps=10.0, gemm_tflops=0.1, **NO_GPU)
SMALL = ("-p", "8", "-n", "4", "-r", "3")


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small matrices: more threads only wait for each other, seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.peaks.measure_peaks", lambda *_, **__: PEAKS)


def run(*arguments: str) -> Result:
    """On the CPU, unless ``arguments`` say otherwise."""
    options = ("--device", "cpu", "--cpu-threads", "1")
    return CliRunner().invoke(cli, ["bench", *options, *arguments])


def records(*arguments: str) -> list[dict[str, Any]]:
    done = run(*arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_a_page_has_a_point_for_each_test(known_peaks: None, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    done = run(*SMALL, "-pg", "4,2", "--html", str(page))
    assert done.exit_code == 0, done.output
    root = ET.fromstring(page.read_text().partition("\n")[2])
    dots = [e for e in root.iter() if e.tag.endswith("}circle")]
    assert len(dots) == 2  # a test that reads and writes is neither
    said = " ".join(root.itertext())
    assert "pp8" in said and "tg4" in said and "host memory, 10 GB/s" in said


def test_a_decode_points_flops_are_counted_by_hand(known_peaks: None) -> None:
    """Of a model without attention's share: each token multiplies by each weight it uses once."""
    from fiddler.benchmark.roofline import _decode_flops
    from fiddler.benchmark.work import prompt_flops
    from fiddler.models.shapes import load_shape

    config = load_shape("olmoe-1b-7b")
    tally = Tally(config.num_layers, config.num_experts)
    ids = {layer: np.arange(8)[None] for layer in range(16)}
    is_resident = np.zeros((16, 64), bool)
    is_resident[:, :2] = True
    for _ in range(3):
        tally.add(ids, is_resident)
    subject = SimpleNamespace(config=config)
    measured = SimpleNamespace(
        case=Case(n_prompt=0, n_gen=3, n_depth=5, n_parallel=1), decode=tally, samples_ns=[1]
    )
    cold, hot = _decode_flops(subject, measured)
    assert cold == 2 * 3 * 16 * 6 * config.expert_numel
    one_by_one = sum(prompt_flops(config, at, at + 1) for at in (5, 6, 7))
    assert cold + hot == pytest.approx(one_by_one)


def test_json_has_the_keys_and_its_numbers_agree() -> None:
    rows = records(*SMALL, "-pg", "9,3", "-d", "0,20", "--batch", "1,2", "--vram-gb", "0.015")
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"], r["n_parallel"]) for r in rows] == [
        (n_prompt, n_gen, depth, batch)
        for batch in (1, 2)
        for depth in (0, 20)
        for n_prompt, n_gen in ((8, 0), (0, 4), (9, 3))
    ]
    for row in rows:
        assert row.keys() == LLAMA_BENCH | OURS
        num_tokens = row["n_parallel"] * (row["n_prompt"] + row["n_gen"])
        samples = row["samples_ns"]
        assert len(samples) == 3
        assert row["samples_ts"] == pytest.approx([num_tokens * NS / ns for ns in samples])
        assert row["avg_ns"] == pytest.approx(statistics.mean(samples), abs=1)
        assert row["stddev_ns"] == pytest.approx(statistics.stdev(samples), abs=1)
        assert row["avg_ts"] == pytest.approx(statistics.mean(row["samples_ts"]))
        assert row["median_ts"] == pytest.approx(num_tokens * NS / statistics.median(samples))
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(row["samples_ts"]))
        assert row["ratio"] == pytest.approx(row["median_ts"] / row["limit_ts"])
        assert 0 < row["n_gpu_experts"] < 64
        assert 0 < row["hit_rate"] < 1
        assert 0 < row["routing_entropy"] <= 4
        assert (row["cpu_gbps"] is None) == (row["n_prompt"] > 0)
        assert row["gpu_gbps"] is None and row["pcie_gbps"] is None
        assert row["model_n_params"] == 7_358_976


@pytest.mark.usefixtures("known_peaks")
def test_experts_on_disk_are_told() -> None:
    (row,) = records("-p", "0", "-n", "4", "-r", "1", "--ram-gb", "0.012")
    assert 0 < row["n_disk_experts"] < 64 and row["n_gpu_experts"] == 0
    (row,) = records("-p", "0", "-n", "4", "-r", "1")
    assert row["n_disk_experts"] == 0


@pytest.mark.usefixtures("known_peaks")
def test_a_batch_is_the_largest_step_and_a_file_name_the_models_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fiddler.engine.scheduler import Schedule, Scheduler

    sizes = []

    def schedule(self: Scheduler) -> Schedule:
        step = own_schedule(self)
        sizes.append(sum(chunk.num_tokens for chunk in (*step.prefills, *step.decodes)))
        return step

    own_schedule = Scheduler.schedule
    monkeypatch.setattr(Scheduler, "schedule", schedule)
    [row] = records("-p", "2100", "-n", "0", "-r", "1")
    assert row["n_batch"] == row["n_ubatch"] == max(sizes) < 2100
    assert row["backends"] == "CPU"
    assert (Path(row["model_filename"]) / "config.json").is_file()


@pytest.mark.usefixtures("known_peaks")
def test_repeats_and_commas_are_all_measured_in_order_and_once() -> None:
    prompts = ["-p", "9,8", "-p", "4", "-p", "8"]
    lengths = [*prompts, "-n", "2", "-n", "3,2", "-pg", "4,2", "-pg", "4,2"]
    rows = records(*lengths, "-r", "1", "-d", "7", "-d", "0,7", "--batch", "2", "--batch", "1")
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"], r["n_parallel"]) for r in rows] == [
        (n_prompt, n_gen, depth, batch)
        for batch in (2, 1)
        for depth in (7, 0)
        for n_prompt, n_gen in ((9, 0), (8, 0), (4, 0), (0, 2), (0, 3), (4, 2))
    ]


@pytest.mark.usefixtures("known_peaks")
def test_the_limit_is_that_of_the_bytes_and_products_of_the_model() -> None:
    """Four layers, 4 of 16 experts of 3 x 256 x 128 in bfloat16, the rest in float32; by hand."""
    prompt, decode, both = records(*SMALL, "-pg", "8,4")
    expert = 3 * 256 * 128 * 2
    # embedding (tied: it is the head), norms, and per layer q, k, v, o, q/k norm, router
    layer = (8 + 2 + 2) * 32 * 256 + 256 * 8 * 32 + 2 * 32 + 16 * 256 + 2 * 256
    dense = 4 * (1536 * 256 + 256 + 4 * layer)
    kv = 4 * 2 * 2 * 32 * 4
    token_bytes = 4 * 4 * expert + dense + kv * (1 + 2 + 3 + 4) / 4
    assert decode["limit_ts"] == pytest.approx(10e9 / token_bytes)
    assert decode["cpu_gbps"] == pytest.approx(16 * expert * decode["median_ts"] / 1e9)
    flops = 2 * (8 * (4 * layer + 16 * expert / 2) + 2 * 8 * 32 * 4 * 36 + 1536 * 256)
    assert prompt["limit_ts"] <= 8 / (flops / 0.1e12)  # or its weights' bytes, which take longer
    assert prompt["limit_ts"] >= 8 / ((64 * expert + dense) / 10e9)
    more_kv = kv * 8 * 4  # written behind the prompt
    decode_s = 4 / decode["limit_ts"] + more_kv / 10e9
    prompt_s = 8 / prompt["limit_ts"]  # the same prompts
    assert both["limit_ts"] == pytest.approx(12 / (prompt_s + decode_s))


@pytest.mark.usefixtures("known_peaks")
@pytest.mark.parametrize("routing", ["model", "zipf:1.2", "sticky:0.9"])
def test_runs_of_one_seed_route_alike(routing: str) -> None:
    def routed(seed: str) -> tuple[float, ...]:
        rows = records(*SMALL, "--routing", routing, "--seed", seed, "--vram-gb", "0.015")
        assert {row["routing"] for row in rows} == {routing}
        return *(row["routing_entropy"] for row in rows), *(row["hit_rate"] for row in rows)

    assert routed("1") == routed("1") != routed("2")


@pytest.mark.usefixtures("known_peaks")
def test_without_a_calibration_nothing_is_predicted_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("offload.calibration.cache_file", lambda: tmp_path / "cpu.json")
    done = run("-p", "8", "-n", "0", "-r", "1")
    assert "no predictions: this machine is not calibrated; fiddler calibrate" in done.stderr
    assert "predicted" not in done.stdout


@pytest.mark.usefixtures("known_peaks")
def test_predictions_are_sums_of_terms_and_a_wrong_one_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call of torch is taken to last a millisecond: the tests must be faster than that."""
    rates = replace(find_machine("h200-16core").rates, call_s=1e-3)
    monkeypatch.setattr("fiddler.speed.own_rates", lambda hardware: (rates, ""))
    prompt, decode = records(*SMALL, "--vram-gb", "0.015", "--routing", "uniform")
    for row, kind, other, runs in ((prompt, "prompt", "step", 8), (decode, "step", "prompt", 1)):
        seconds = sum(term["seconds"] for term in row["predicted_terms"][kind])
        assert row["predicted_ts"] == pytest.approx(runs / seconds)
        assert row["predicted_terms"][other] == []
        assert row["prediction_off"].startswith(("pp8, batch 1, took ", "tg4, batch 1, took "))
        told = " of a watched step's ", "which part is off cannot be told"  # on a busy machine
        assert any(part in row["prediction_off"] for part in told)
    table = run(*SMALL, "--vram-gb", "0.015").stdout
    assert "| predicted |" in table and "tg4, batch 1, took " in table


@pytest.mark.usefixtures("known_peaks")
def test_csv_has_the_columns_of_json() -> None:
    done = run("-p", "0", "-n", "3", "-r", "1", "-o", "csv", "--routing", "uniform")
    assert done.exit_code == 0, done.output
    [row] = csv.DictReader(io.StringIO(done.stdout))
    assert row.keys() >= LLAMA_BENCH | OURS
    assert row["routing"] == "uniform"
    assert json.loads(row["samples_ns"]) == [int(row["avg_ns"])]
    assert float(row["avg_ts"]) == pytest.approx(3 * NS / int(row["avg_ns"]))


@pytest.mark.usefixtures("known_peaks")
def test_markdown_is_a_table_on_stdout_and_progress_is_not() -> None:
    done = run("-p", "8", "-n", "3", "-r", "2", "-d", "16")
    assert done.exit_code == 0, done.output
    head, rule, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[5:7]] == ["test", "t/s"]
    assert set(rule) == set("|-: ")
    assert ["pp8 @ d16" in rows[0], "tg3 @ d16" in rows[1], len(rows)] == [True, True, 2]
    assert all(" ± " in row for row in rows)
    assert "limits from: CPU reads 10.0 GB/s, products 0.1 TFLOP/s" in done.stdout
    assert "tg3 @ d16, batch 1: " in done.stderr
    assert "batch 1:" not in done.stdout


@pytest.mark.usefixtures("known_peaks")
def test_a_narrow_terminal_gets_a_record_for_each_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.cli.bench.output_width", lambda: 40)
    done = run(*SMALL)
    assert done.exit_code == 0, done.output
    names = [line.split()[0] for line in done.stdout.splitlines() if line]
    assert names.count("test") == names.count("t/s") == done.stderr.count(" tok/s") > 0
    assert "|" not in done.stdout


@pytest.mark.usefixtures("known_peaks")
def test_a_timeline_of_two_steps(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    done = run(*SMALL, "--routing", "uniform", "--trace", str(path))
    assert done.exit_code == 0, done.output
    assert f"wrote {path}; open it at https://ui.perfetto.dev" in done.stderr
    found = json.loads(path.read_text())
    assert found["otherData"]["test"] == "pp8+tg3, batch 1"
    rows = rows_of(found)
    assert list(rows) == [("engine", "steps"), ("CPU workers", "jobs"), ("CPU workers", "worker 0")]
    for row in rows.values():
        assert_nested(row)
    steps, jobs = rows["engine", "steps"], rows["CPU workers", "jobs"]
    assert [step["name"] for step in steps] == ["prompt, 8 tokens", "decode, 1 token"]
    assert {job["name"] for job in jobs} <= {f"layer {n}" for n in range(4)} | {
        "phase 1",
        "phase 2",
    }
    assert any(job["name"].startswith("layer") for job in jobs)  # a busy machine may miss some
    assert_nested(steps + jobs)


@pytest.mark.usefixtures("known_peaks")
def test_a_timeline_of_what_is_measured_only(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    done = run("-p", "0", "-n", "2", "-d", "9", "-r", "1", "--trace", str(path))
    assert done.exit_code == 0, done.output
    steps = rows_of(json.loads(path.read_text()))["engine", "steps"]
    assert [step["name"] for step in steps] == ["decode, 1 token"]


@pytest.mark.parametrize("option", ["--trace", "--html"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    option: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also as root, whom modes do not stop."""
    monkeypatch.setattr("fiddler.cli.bench._measure", lambda *_: pytest.fail("it was measured"))
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    for path in (Path("/proc/new"), *([] if os.access(folder, os.W_OK) else [folder / "new"])):
        done = run(*SMALL, option, str(path))
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert f"{path} cannot be written" in done.stderr and "writable folder" in done.stderr


def test_a_file_is_not_written_over_another_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither by another spelling or a link, whether it is there or not."""
    monkeypatch.setattr("fiddler.cli.bench._measure", lambda *_: pytest.fail("it was measured"))
    path, linked = tmp_path / "out", tmp_path / "linked"
    same = f"{tmp_path}/../{tmp_path.name}/out"
    timeline = "is where the timeline goes: it would be overwritten"
    for html in (str(path), same):
        done = run(*SMALL, "--html", html, "--trace", str(path))
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert f"--html {html} {timeline}" in done.stderr and "another file" in done.stderr
    assert not path.exists()
    path.touch()
    linked.hardlink_to(path)
    done = run(*SMALL, "--html", str(linked), "--trace", str(path))
    assert done.exit_code == 1 and f"--html {linked} {timeline}" in done.stderr
    for option in ("--html", "--trace"):
        done = run(*SMALL, option, str(path), "--profile", same)
        assert (done.exit_code, done.stdout) == (1, ""), done.output
        assert f"{option} {path} is the profile: it would be overwritten" in done.stderr


@pytest.mark.usefixtures("known_peaks")
def test_the_table_is_printed_although_a_file_cannot_be_written() -> None:
    done = run(*SMALL, "--trace", "/dev/full")
    assert done.exit_code == 1 and "| tg4 " in done.stdout
    assert "/dev/full cannot be written: No space left" in done.stderr


@pytest.mark.gpu
def test_a_timeline_shows_the_gpu_beside_the_workers(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    shape = ("--device", "cuda", "--shape", "olmoe-1b-7b", "--vram-gb", "6")
    done = run(
        "-p", "256", "-n", "4", "-r", "1", *shape, "--cpu-threads", "4", "--trace", str(path)
    )
    print(done.stderr[-2000:])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    rows = rows_of(found)
    print(found["otherData"], {row: len(events) for row, events in rows.items()})
    for row in rows.values():
        assert_nested(row)
    reads, decodes = rows["engine", "steps"]
    streams = [events for (process, _), events in rows.items() if process == "GPU"]
    on_gpu = [event for events in streams for event in events]

    def inside(step: dict[str, Any], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [e for e in events if step["ts"] <= e["ts"] < step["ts"] + step["dur"]]

    layers = [e for e in rows["CPU workers", "jobs"] if e["name"].startswith("layer")]
    print([(len(inside(step, on_gpu)), len(inside(step, layers))) for step in (reads, decodes)])
    assert len(inside(decodes, on_gpu)) > 16 * 5  # kernels of a graph's replay are seen one by one
    assert len(inside(decodes, layers)) > 8
    busy_us = sum(e["dur"] for e in inside(decodes, on_gpu))
    print(f"decode: {decodes['dur']:.0f} us, GPU busy {busy_us:.0f} us")
    copies = [e for e in inside(reads, on_gpu) if e["name"].startswith("Memcpy HtoD")]
    print(f"prompt: {len(copies)} copies to the device, {sum(e['dur'] for e in copies):.0f} us")
    assert copies


@pytest.mark.gpu
def test_a_gpu_has_its_figures() -> None:
    shape = ("--device", "cuda", "--shape", "olmoe-1b-7b", "--vram-gb", "6")
    rows = records(*SMALL, *shape, "--cpu-threads", "4", "--routing", "uniform")
    for row in rows:
        assert row["backends"] == "CUDA"
        assert 0 < row["hit_rate"] < 1
        assert 0 < row["ratio"] < 1.1
        assert 0 < row["peak_vram_bytes"] <= 6 << 30
        assert row["peak_joint_gbps"] >= row["peak_cpu_read_gbps"] > 0
        assert row["peak_gpu_read_gbps"] > row["peak_pcie_gbps"] > 1
    assert rows[1]["gpu_gbps"] < rows[1]["peak_gpu_read_gbps"]
    assert 0 < rows[1]["cpu_gbps"] < rows[1]["peak_joint_gbps"]
    for row in rows:
        assert 0 <= row["pcie_gbps"] < 1.1 * row["peak_pcie_gbps"]


@pytest.mark.usefixtures("known_peaks")
def test_a_shape_has_seeded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {
        **SHAPES["olmoe-1b-7b"],
        **{"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 8},
        **{"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4},
    }
    monkeypatch.setitem(SHAPES, "tiny", tiny)
    rows = records(*SMALL, "--shape", "tiny")
    assert {row["model_type"] for row in rows} == {"tiny float32, experts bfloat16"}
    assert {row["model_filename"] for row in rows} == {""}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--routing", "unifrom"), 1, "unknown routing 'unifrom'; did you mean 'uniform'?"),
        (("--routing", "zipff:1.2"), 1, "did you mean 'zipf:1.2'?"),
        (("--shape", "qwen3-30b"), 1, "did you mean 'qwen3-30b-a3b'?"),
        (("-m", "builtin", "--shape", "olmoe-1b-7b"), 2, "not both"),
        (("-p", "0", "-n", "0"), 1, "there is nothing to measure"),
        (("-p", "512,x"), 2, "'512,x' is not a list of numbers"),
        (("-p", "8", "-p", "x"), 2, "'x' is not a list of numbers"),
        (("-pg", "512"), 2, "'512' is not a prompt's and an answer's length"),
        (("-pg", "512,0"), 2, "as in 512,128"),
        (("--batch", "0"), 2, "'0' is not a list of numbers from 1 on"),
        (("--trace", "no/such/folder/steps.json"), 1, "cannot be written there"),
        (("--html", "no/such/folder/page.html"), 1, "cannot be written there"),
        (("-p", "5000"), 1, "hint: use -p or -n, with -d, of 4096 or less"),
        (("-p", "4000", "-r", "1", "--batch", "9", "--vram-gb", "0.07"), 1, "has room for"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, said: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr

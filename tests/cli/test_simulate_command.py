"""``fiddler simulate`` on drawn and on recorded routes: figures that agree, and refusals."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from plan_machine import WITH_GPU, set_machine

from fiddler._version import __version__
from fiddler.cli import cli
from fiddler.cli.simulate_table import POLICIES
from offload.calibration import Calibration, default_path
from offload.machine_facts import this_machine
from offload.machine_rates import RATES
from offload.popularity import Popularity, Profile, save_profile
from offload.reference_machines import find_machine, record_of
from offload.routing_trace import RoutingTrace, save_trace
from tests.offload.planner_cases import model

SMALL = ("--shape", "olmoe-1b-7b", "--tokens", "120")
H200 = find_machine("h200-16core")
SIZES = model(
    num_layers=3,
    moe_layers=(0, 2),
    expert_bytes=1_000_000,
    dense_bytes=2_000_000,
    dense_read_bytes=1_500_000,
    kv_bytes_per_token=64,
    step_tokens=512,
    workspace_bytes=1_000,
)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, ["simulate", *map(str, arguments)])


def rows(*arguments: Any) -> dict[str, dict[str, float]]:
    """Verdicts by policy, for one budget."""
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return {row["policy"]: row for row in json.loads(done.stdout)["rows"]}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """100 tokens that mostly use experts 0 to 3 of layer 0 and 4 to 7 of layer 2."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 8, (100, 2, 2))
    near = rng.integers(0, 4, (100, 2, 2)) + np.array([0, 4])[None, :, None]
    experts_TMK = np.where(rng.random((100, 2, 2)) < 0.8, near, wide).astype(np.int16)
    path = tmp_path / "trace.npz"
    save_trace(
        RoutingTrace(
            model="org/name",
            revision=None,
            corpus_sha256="text",
            footprint=SIZES,
            experts_TMK=experts_TMK,
            tokens_T=np.arange(100, dtype=np.int32),
            starts_W=np.array([0]),
        ),
        path,
    )
    return path


def saved_profile(
    folder: Path, *, of: str, text: str, counts: npt.NDArray[np.int64] | None = None
) -> Path:
    """A profile of layers 0 and 2, all experts chosen alike unless ``counts`` says otherwise."""
    profile = Profile(
        model=of,
        architecture=None,
        revision=None,
        corpus_sha256=text,
        num_tokens=15,
        popularity=Popularity(np.ones((3, 8), dtype=np.int64) if counts is None else counts),
        created="now",
    )
    save_profile(profile, folder / "p.json")
    return folder / "p.json"


def test_a_table_for_each_budget() -> None:
    done = run(*SMALL, "--slots", "100", "--vram-gb", "6")
    assert done.exit_code == 0, done.output
    assert "olmoe-1b-7b: 90 steps of 1 token played" in done.stdout
    assert "100 of 1,024 experts on the GPU" in done.stdout
    assert "experts on the GPU (6 GiB)" in done.stdout
    assert done.stdout.count("oracle") == 3
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_steps_of_each_policy_and_size_are_told_on_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def bars() -> Iterator[Any]:
        yield lambda what, *at: told.setdefault(what, []).append(at)

    monkeypatch.setattr("fiddler.cli.simulate.progress_bars", bars)
    assert run(*SMALL, "--slots", "100", "--slots", "1000").exit_code == 0
    assert list(told) == [
        f"{name}, {size} experts" for size in ("100", "1,000") for name in POLICIES
    ]
    assert all(at == [(0, 90), (64, 90), (90, 90)] for at in told.values())


def test_a_narrow_terminal_cuts_nothing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert "\N{HORIZONTAL ELLIPSIS}" not in run(*SMALL, "--slots", "100").stdout


def test_the_rates_behind_the_limit_are_told() -> None:
    for given, told in (
        (("--hardware", "h200-16core"), "160 GB/s, PCIe 55.3, GPU memory 4,200"),
        (("--gbps", "7.5,2,1e3"), "7.5 GB/s, PCIe 2, GPU memory 1,000"),
    ):
        out = run(*SMALL, "--slots", "100", *given).stdout
        assert f"limit: host memory gives {told}" in out


def test_a_prediction_is_the_plans() -> None:
    """As for the plan, of as many experts of layers that have use without favourites."""
    size = ("--shape", "qwen3-30b-a3b", "--vram-gb", "24", "--hardware", "h200-16core")
    plan = CliRunner().invoke(cli, ["plan", *size, "--json"])
    planned = json.loads(plan.stdout)
    found = rows(*size, "--tokens", "200", "--routing", "uniform")["no profile"]
    mine, theirs = found["predicted_tokens_per_s"], planned["speeds"]["decode"]["tokens_per_s"]
    assert mine == pytest.approx(theirs, rel=0.05)
    assert mine < found["limit_tokens_per_s"]


@pytest.mark.parametrize("vram", ["23.6", "24", "80"])
def test_vram_is_had_as_for_a_plan(vram: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a named machine, by one that stands for this one, and by this one's own GPU."""
    set_machine(monkeypatch, WITH_GPU.without_gpu())
    size = ("--shape", "olmoe-1b-7b", "--vram-gb", vram)
    named = ("--hardware", "rtx4090-ddr5")
    said = CliRunner().invoke(cli, ["plan", *size, *named]).stderr.partition("hint: ")[0]
    assert said.startswith("error: ") and "23.5 GiB of the 24.0 GiB" in said
    for given in ((), named):
        refused = run(*size, "--tokens", "120", *given)
        assert refused.exit_code == 1 and refused.stderr.startswith(said), given
        assert "use --vram-gb 23.5 or less, or name a larger --hardware" in refused.stderr
    set_machine(monkeypatch, WITH_GPU)
    assert "of the Test GPU can be had" in " ".join(run(*size).stderr.split())
    larger = (("--hardware", "h200-16core"), ("--gbps", "7.5,2,1e3"))
    for given in larger:
        assert run(*size, "--tokens", "120", *given).exit_code == 0, given
    assert run(*SMALL, "--vram-gb", "23.5").exit_code == 0


def test_rates_are_of_the_machine_or_of_one_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.calibration.cache_file", lambda: tmp_path / "cpu.json")
    small = (*SMALL, "--slots", "100")
    set_machine(monkeypatch, WITH_GPU)
    out = run(*small).stdout
    assert "- by the rates of rtx4090-ddr5: composed from" in out
    assert "- this machine is not calibrated: fiddler calibrate" in out
    Calibration(default_path(), this_machine(WITH_GPU, __version__)).store(RATES, {}, H200.rates)
    own = run(*small).stdout
    assert "- by this machine's rates" in own and "not calibrated" not in own
    named = run(*small, "--hardware", "h200-16core").stdout
    assert "- by the rates of h200-16core: measured" in named
    assert own.split("\n\n")[2] == named.split("\n\n")[2] != out.split("\n\n")[2]
    set_machine(monkeypatch, WITH_GPU.without_gpu())
    out = run(*small).stdout
    assert "- by the rates of rtx4090-ddr5" in out
    assert "- this machine has no GPU: --hardware names another" in out


def test_a_machine_without_a_gpu_places_nothing(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    rates = replace(H200.rates, peaks=H200.rates.peaks_for(on_gpu=False))
    hardware = H200.hardware.without_gpu()
    path.write_text(
        json.dumps(record_of(replace(H200, name="small", hardware=hardware, rates=rates)))
    )
    done = run(*SMALL, "--hardware", path)
    assert done.exit_code == 1 and "small has no GPU on which experts" in done.stderr


def test_nothing_is_predicted_from_less_than_a_machine_and_a_model(trace: Path) -> None:
    for given, why in (
        ((*SMALL, "--gbps", "10,5,100"), "tok/s: not predicted from --gbps alone"),
        ((trace,), "as the trace is of an earlier release: make a new one with fiddler profile"),
    ):
        assert why in run(*given, "--slots", "6").stdout
        assert rows(*given, "--slots", "6")["static"]["predicted_tokens_per_s"] is None


def test_the_law_decides_who_wins() -> None:
    """Skew suits a static placement, a changing subject whatever follows it, and chance nobody."""
    size = ("--slots", "256")
    skewed = rows(*SMALL, *size, "--routing", "zipf:1.5")
    assert skewed["static"]["hit_rate"] > skewed["no profile"]["hit_rate"] + 0.3
    even = rows(*SMALL, *size, "--routing", "uniform")
    for name in ("no profile", "static", "lru", "adaptive"):
        assert abs(even[name]["hit_rate"] - 0.25) < 0.05
    sticky = rows(*SMALL, *size, "--routing", "sticky:0.9")
    assert sticky["lru"]["hit_rate"] > 0.85 > 0.5 > sticky["static"]["hit_rate"]


def test_figures_agree_with_each_other(trace: Path) -> None:
    found = rows(trace, "--slots", "6", "--gbps", "10,5,100")
    assert set(found) == set(POLICIES)
    for row in found.values():
        assert row["cold_bytes"] == pytest.approx((1 - row["hit_rate"]) * reads_of(found) * 1e6)
        assert row["hit_rate"] <= found["oracle"]["hit_rate"]
    static = found["static"]
    assert static["moved_bytes"] == 0
    # all steps are bound by host memory, or by dense weights where nothing misses
    per_token = 1 / static["limit_tokens_per_s"]
    assert static["cold_bytes"] / 10e9 <= per_token <= static["cold_bytes"] / 10e9 + 1.5e6 / 100e9
    lru = found["lru"]
    assert lru["moved_bytes"] == pytest.approx(lru["cold_bytes"])


def reads_of(found: dict[str, dict[str, float]]) -> float:
    """Reads of a token, from the oracle's figures."""
    oracle = found["oracle"]
    return oracle["cold_bytes"] / 1e6 / (1 - oracle["hit_rate"])


def test_more_copies_follow_a_changing_subject_closer() -> None:
    options = (*SMALL[:3], "400", "--routing", "drift:100", "--slots", "300")
    few, many = (rows(*options, "--copy-share", share)["adaptive"] for share in ("0.001", "0.2"))
    assert many["hit_rate"] > few["hit_rate"] + 0.05
    assert many["moved_bytes"] > few["moved_bytes"]


def test_a_batch_shares_reads(trace: Path) -> None:
    alone, together = (rows(trace, "--slots", "6", "--batch", n)["static"] for n in (1, 4))
    assert together["cold_bytes"] < 0.8 * alone["cold_bytes"]
    assert together["limit_tokens_per_s"] > alone["limit_tokens_per_s"]
    size = (*SMALL, "--slots", "256", "--hardware", "h200-16core")
    alone, together = (rows(*size, "--batch", n)["static"] for n in (1, 4))
    assert together["predicted_tokens_per_s"] > 1.2 * alone["predicted_tokens_per_s"]


def test_a_profile_places(trace: Path, tmp_path: Path) -> None:
    counts = np.zeros((3, 8), dtype=np.int64)
    counts[0, :3], counts[2, 4:7] = 5, 5
    profile = saved_profile(tmp_path, of="name", text="other", counts=counts)
    done = run(trace, "--slots", "6", "--profile", profile, "--json")
    record = json.loads(done.stdout)
    assert record["steps"] == 100 and "own text" not in done.stderr
    by_name = {row["policy"]: row["hit_rate"] for row in record["rows"]}
    assert by_name["static"] > by_name["no profile"] + 0.1


def test_a_profile_of_the_same_text_is_told(trace: Path, tmp_path: Path) -> None:
    profile = saved_profile(tmp_path, of="org/name", text="text")
    done = run(trace, "--slots", "6", "--profile", profile)
    assert "of the trace's own text" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "a simulation needs either a TRACE or --shape NAME"),
        (("{trace}", "--shape", "olmoe-1b-7b"), "--shape olmoe-1b-7b were given, but"),
        (("{trace}", "--routing", "uniform"), "brings its own routes: --routing needs --shape"),
        (("{trace}", "--tokens", "3"), "--tokens needs --shape"),
        (("{trace}", "--profile", "p", "--train", "0.5"), "either --profile or --train"),
        (("{trace}", "--slots", "17"), "--slots 17 is more than the model's 16 experts"),
        (
            ("{trace}", "--batch", "9"),
            "100 tokens make 11 steps of 9 requests; at least 189 tokens are needed",
        ),
        (("{trace}", "--vram-gb", "0.1"), "of VRAM before any expert, not 0.1 GiB"),
        (("{trace}", "--vram-gb", "1e300"), "vram_gb must be 0 or more GiB, not 1e+300"),
        (("{trace}", "--profile", "none.json"), "none.json cannot be read: No such file"),
        (("none.npz",), "the trace none.npz cannot be read: No such file"),
        (("--shape", "olmoe"), "did you mean 'olmoe-1b-7b'?"),
        (("--shape", "olmoe-1b-7b", "--routing", "model"), "no router whose choices"),
        (("--shape", "olmoe-1b-7b", "--routing", "zip"), "'zipf:S'"),
        ((*SMALL, "--gbps", "1,2"), "not three rates above 0"),
        ((*SMALL, "--gbps", "1,0,3"), "not three rates above 0"),
        ((*SMALL, "--gbps", "1,2,3", "--hardware", "h200"), "either --gbps or --hardware"),
        ((*SMALL, "--hardware", "h200-16cores"), "did you mean 'h200-16core'?"),
    ],
)
def test_bad_input_is_one_sentence(trace: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = run(*[argument.format(trace=trace) for argument in arguments])
    assert done.exit_code in (1, 2), done.output
    assert sentence in " ".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", "1"), "1 token makes 1 step of 1 request; at least 21 tokens"),
        (
            ("--batch", "100000"),
            "2,048 tokens make no step of 100,000 requests; at least 2,100,000",
        ),
        (
            ("--batch", "200", "--train", "0"),
            "make 10 steps of 200 requests; at least 3,200 tokens",
        ),
        (("--tokens", "99", "--train", "0.9"), "at least 156 tokens are needed, for 140 steps to"),
    ],
)
def test_too_few_tokens_are_told_how_many_are_enough(options: tuple[str, ...], words: str) -> None:
    shape = ("--shape", "olmoe-1b-7b", "--slots", "100")
    refused = run(*shape, *options)
    assert refused.exit_code == 1 and words in refused.stderr, refused.output
    [least] = re.findall(r"at least ([\d,]+) tokens", refused.stderr)
    enough = int(least.replace(",", ""))
    if enough < 10_000:
        assert run(*shape, *options, "--tokens", enough).exit_code == 0
        assert run(*shape, *options, "--tokens", enough - 1).exit_code == 1


def test_a_profile_of_another_model_is_refused(trace: Path, tmp_path: Path) -> None:
    profile = saved_profile(tmp_path, of="org/other", text="x")
    done = run(trace, "--profile", profile)
    assert done.exit_code == 1 and "is of org/other" in done.stderr

"""``fiddler calibrate`` with made-up measurements: what is kept, printed, written and refused."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cpu_kernels.isa import NEEDS, isa_from_features
from fiddler._version import __version__
from fiddler.cli import cli
from fiddler.cli.calibrated import renew_calibration
from fiddler.speed import own_rates
from offload.calibration import Calibration, default_path, locked
from offload.hardware import Hardware, probe
from offload.machine_facts import this_machine
from offload.machine_rates import RATES, MachineRates
from offload.measuring import Step
from offload.prefill_costs import COPY_TIME
from offload.reference_machines import find_machine
from tests.offload.test_measuring import ONLY_CPU, PEAKS, TIMES

CPU_RATES = MachineRates(num_threads=3, peaks=ONLY_CPU, times=TIMES, call_s=1e-6, cpu_tflops=0.5)
STEPS = (
    Step("memory", lambda setting: {"peaks": ONLY_CPU}),
    Step("CPU experts", lambda setting: {"times": TIMES, "call_s": 1e-6, "cpu_tflops": 0.5}),
)


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = probe("cpu")
    monkeypatch.setattr("offload.hardware.probe", lambda device="auto": machine)
    monkeypatch.setattr("offload.measuring.machine_steps", lambda: STEPS)
    monkeypatch.setattr("offload.measuring.kernels_to_compile", list)
    monkeypatch.setattr("offload.calibration.cache_file", lambda: tmp_path / "cache" / "cpu.json")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["calibrate", *arguments])


def test_figures_are_printed_and_kept_for_this_machine() -> None:
    done = run()
    assert done.exit_code == 0, done.output
    assert "1 of 2: memory" in done.stderr and "2 of 2: CPU experts" in done.stderr
    assert "no GPU here" in done.stderr
    assert "CPU reads  100.0 GB/s" in " ".join(done.stdout.split(" " * 8))
    assert "bf16/bf16" in done.stdout and "by columns from M = " in done.stdout
    known = Calibration(default_path(), this_machine(probe("cpu"), __version__))
    rates = known.known(RATES, {})
    assert rates is not None and rates.times == TIMES


@pytest.mark.parametrize("names", [[], ["bf16/f32", "workers"]])
def test_what_has_to_be_compiled_is_compiled_first(
    names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr("offload.measuring.kernels_to_compile", lambda: names)

    @contextmanager
    def precompiling(names: list[str]) -> Iterator[None]:
        seen.append(names)
        yield
        seen.append("ended")

    monkeypatch.setattr("cpu_kernels.precompile.precompiling", precompiling)
    monkeypatch.setattr("offload.measuring.wake_gpu", lambda hardware: seen.append("GPU"))
    done = run()
    assert done.exit_code == 0, done.output
    assert seen == [names, *(["GPU"] if names else []), "ended"]
    assert done.stderr.startswith("compiling CPU kernels, once\n") == bool(names)


def test_free_ram_is_read_when_nothing_compiles_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = probe("cpu"), [1 << 30]

    @contextmanager
    def precompiling(names: list[str]) -> Iterator[None]:
        yield
        taken.pop()

    def now(device: str = "auto") -> Hardware:
        return replace(real, ram_available_bytes=(8 << 30) - sum(taken))

    monkeypatch.setattr("cpu_kernels.precompile.precompiling", precompiling)
    monkeypatch.setattr("offload.hardware.probe", now)
    assert run("--output", str(tmp_path / "machine.json")).exit_code == 0
    kept = find_machine(str(tmp_path / "machine.json")).hardware
    assert kept.ram_available_bytes == 8 << 30


def keep_old(**changed: Any) -> None:
    """What another version, or other hardware, has left."""
    now = this_machine(probe("cpu"), __version__)
    machine = replace(now, **{name: {**getattr(now, name), **new} for name, new in changed.items()})
    Calibration(default_path(), machine).store(RATES, {}, CPU_RATES)


PLAN = ("plan", "--shape", "olmoe-1b-7b", "--device", "cpu")


@pytest.mark.parametrize(
    "changed", [{"versions": {"torch": "1.0"}}, {"hardware": {"cpu_name": "Other CPU"}}]
)
def test_old_figures_are_measured_again_by_themselves(changed: dict[str, Any]) -> None:
    keep_old(**changed)
    done = CliRunner().invoke(cli, PLAN)
    assert done.exit_code == 0, done.output
    assert "calibrating, which takes a minute" in done.stderr
    assert "2 of 2: CPU experts" in done.stderr and "measured here" in done.stdout
    again = CliRunner().invoke(cli, PLAN)
    assert again.stderr == "" and again.stdout == done.stdout


def test_who_never_calibrated_is_not_made_to_wait() -> None:
    done = CliRunner().invoke(cli, PLAN)
    assert "calibrating" not in done.stderr and not default_path().exists()


def test_of_two_starts_one_measures_and_the_other_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_old(versions={"torch": "1.0"})
    times = 0

    def once(setting: object) -> dict[str, Any]:
        nonlocal times
        times += 1
        return {"peaks": ONLY_CPU, "times": TIMES, "call_s": 1e-6, "cpu_tflops": 0.5}

    monkeypatch.setattr("offload.measuring.machine_steps", lambda: [Step("all", once)])
    with ThreadPoolExecutor(2) as starts:
        with locked(default_path().with_name("measuring")):
            waiting = [starts.submit(renew_calibration) for _ in range(2)]
            time.sleep(0.3)
            assert times == 0 and not any(one.done() for one in waiting)
        assert [one.result(timeout=30) for one in waiting] == [None, None]
    assert times == 1


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), KeyboardInterrupt()])
def test_what_cannot_be_measured_again_is_said(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(setting: object) -> dict[str, Any]:
        raise error

    keep_old(versions={"torch": "1.0"})
    monkeypatch.setattr("offload.measuring.machine_steps", lambda: [Step("memory", fails)])
    done = CliRunner().invoke(cli, PLAN)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[-1] == ": ".join(filter(None, ("not calibrated", str(error))))
    assert "other versions (torch 1.0 then" in done.stdout


WAYS = (None, "", "values", "hostfunc")


@pytest.mark.parametrize("then", WAYS)
def test_rates_are_of_the_hand_off_that_they_were_measured_with(
    then: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU; unset and empty mean the same, and so does a file that knows no such setting."""
    hardware = find_machine("rtx4090-ddr5").hardware
    rates = {"peaks": PEAKS, "pull_gbps": 45.0, "hand_over_s": 1e-5}
    rates |= {"launch_s": 1e-6, "python_launch_s": 2e-5}
    monkeypatch.setattr("offload.hardware.probe", lambda device="auto": hardware)
    monkeypatch.setattr(
        "offload.measuring.machine_steps",
        lambda: (*STEPS, Step("the GPU", lambda setting: rates, on_gpu=True)),
    )
    set_way(monkeypatch, then)
    assert run().exit_code == 0
    for now in WAYS:
        set_way(monkeypatch, now)
        found, why_not = own_rates(hardware)
        assert (found is not None) == ((now or None) == (then or None))
        said = f"(FIDDLER_HANDOFF {then or 'none'} then, {now or 'none'} now)"
        assert why_not == ("" if found else f"it was calibrated with other settings {said}")
    kept = json.loads(default_path().read_text())["machines"][0]["measured"].values()
    assert [record["of"] for record in kept] == [{"FIDDLER_HANDOFF": then} if then else {}]


def set_way(monkeypatch: pytest.MonkeyPatch, way: str | None) -> None:
    if way is None:
        monkeypatch.delenv("FIDDLER_HANDOFF", raising=False)
    else:
        monkeypatch.setenv("FIDDLER_HANDOFF", way)


def test_without_a_gpu_there_is_no_hand_off(monkeypatch: pytest.MonkeyPatch) -> None:
    set_way(monkeypatch, "values")
    assert run().exit_code == 0
    set_way(monkeypatch, None)
    assert own_rates(probe("cpu"))[0] is not None


LEVELS = (None, "plain", "avx2")


@pytest.mark.parametrize("then", LEVELS)
def test_rates_are_of_the_instructions_that_they_were_measured_with(
    then: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where FIDDLER_ISA forces fewer than the CPU has; what has no rates yet says why."""
    hardware = probe("cpu")
    set_level(monkeypatch, then)
    assert run().exit_code == 0
    for now in LEVELS:
        set_level(monkeypatch, now)
        Calibration(default_path(), this_machine(hardware, __version__)).store(COPY_TIME, {}, 1.0)
        found, why_not = own_rates(hardware)
        assert (found is not None) == (now == then)
        said = f"(FIDDLER_ISA {then or 'none'} then, {now or 'none'} now)"
        assert why_not == ("" if found else f"it was calibrated with other settings {said}")


def test_rates_of_each_level_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in LEVELS:
        set_level(monkeypatch, level)
        assert run().exit_code == 0
    for level in LEVELS:
        set_level(monkeypatch, level)
        assert own_rates(probe("cpu"))[0] is not None


def set_level(monkeypatch: pytest.MonkeyPatch, level: str | None) -> None:
    """As on a CPU with AVX-512, whichever this one is."""
    needed = NEEDS["avx2"][0] | NEEDS["avx512"][0]
    isa = isa_from_features("x86_64", "skylake-avx512", dict.fromkeys(needed, True), level)
    monkeypatch.setattr("cpu_kernels.thread_count.host_isa", lambda: isa)


def test_a_file_is_a_machine_for_plans(tmp_path: Path) -> None:
    path = tmp_path / "this.json"
    done = run("--json", "--output", str(path))
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(path.read_text())
    machine = find_machine(str(path))
    assert machine.rates.times == TIMES and machine.hardware.cpu_name == probe("cpu").cpu_name


def test_a_file_in_no_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path / "none" / "this.json"))
    assert done.exit_code == 1 and "this.json cannot be written there" in done.stderr
    assert not default_path().exists()


@pytest.mark.parametrize("path", ["/proc/this.json", "/sys/this.json"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(path: str) -> None:
    done = run("--output", path)
    assert done.exit_code == 1 and done.stderr.startswith(f"error: {path} cannot be written: ")
    assert not default_path().exists()


@pytest.mark.parametrize("content", [None, "as it was"])
def test_a_file_stays_as_it_was_until_the_figures_are_there(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "this.json"
    if content is not None:
        path.write_text(content)
    found: list[str | None] = []

    def look(setting: object) -> dict[str, Any]:
        found.append(path.read_text() if path.exists() else None)
        return {}

    monkeypatch.setattr("offload.measuring.machine_steps", lambda: (*STEPS, Step("look", look)))
    assert run("--output", str(path)).exit_code == 0
    assert found == [content] and find_machine(str(path)).rates.times == TIMES


def test_figures_are_printed_although_they_cannot_be_written() -> None:
    done = run("--output", "/dev/full")
    assert done.exit_code == 1 and "100.0 GB/s" in done.stdout
    assert "/dev/full cannot be written: No space left" in done.stderr


@pytest.mark.parametrize("is_named", [False, True])
def test_a_cache_that_cannot_be_written_is_said_at_the_end_too(
    is_named: bool, tmp_path: Path
) -> None:
    """And is an error where nothing else has the figures."""
    (tmp_path / "cache").write_text("")
    named = ("--output", str(tmp_path / "this.json")) if is_named else ()
    with pytest.warns(RuntimeWarning, match="cannot be written .* XDG_CACHE_HOME"):
        done = run(*named)
    assert done.exit_code == (0 if is_named else 1) and "100.0 GB/s" in done.stdout
    assert "not measured, " in done.stdout and "no room" not in done.stdout
    last = " ".join(done.stderr.splitlines()[-2:])
    assert "cannot be written: plan and bench will not know these figures" in last
    assert "XDG_CACHE_HOME" in last and ("this.json has them" in last) == is_named

"""doctor: what it concludes from machines that we do not have, and that it survives this one."""

import builtins
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from terminal import terminal

from cpu_kernels.thread_count import cache_file, measured_num_threads, why_damaged
from fiddler._version import __version__
from fiddler.cli import cli, doctor_facts
from fiddler.cli.console import wrapped
from fiddler.cli.doctor import cost_text, facts_rows
from fiddler.cli.doctor_checks import execution_path, find_problems
from fiddler.cli.doctor_cost import cost_of, mended_rates, whole_rates
from fiddler.cli.doctor_facts import PACKAGES, Facts, collect
from fiddler.cli.doctor_gpu import Gpu
from fiddler.cli.doctor_memory import Cache, cache_of, chosen_word
from fiddler.cli.doctor_problem import Cost, Mend
from fiddler.cli.doctor_speed import link_gbps
from fiddler.speed import RatesHere
from offload.calibration import Calibration, default_path
from offload.link_probe import Link, measure_link
from offload.machine_facts import this_machine
from offload.machine_rates import RATES
from offload.reference_machines import find_machine

GIB = 1 << 30
GOOD_LINK = Link(generation=4, width=16, max_generation=4, max_width=16, copy_gbps=26.5)
CPU_ONLY = Facts(
    fiddler="0.1",
    python="3.11",
    system="Linux",
    packages=dict.fromkeys(PACKAGES, "1.0"),
    physical_cores=8,
    has_avx2=True,
    cache="/cache",
    cache_free_bytes=500 * GIB,
    cache_is_writable=True,
)
WITH_GPU = replace(
    CPU_ONLY,
    packages=CPU_ONLY.packages | {"triton": "3.7.1"},
    triton_wanted="3.7.1",
    torch_cuda="13.0",
    driver="580.65",
    driver_cuda="13.0",
    gpu=Gpu(
        name="RTX 4090",
        count=1,
        capability="8.9",
        vram_total_bytes=24 * GIB,
        vram_free_bytes=22 * GIB + GIB // 2,
    ),
    link=GOOD_LINK,
)


def without(facts: Facts, package: str) -> Facts:
    return replace(facts, packages=facts.packages | {package: None})


@pytest.mark.parametrize("facts", [CPU_ONLY, WITH_GPU])
def test_a_good_machine_has_no_problems(facts: Facts) -> None:
    assert find_problems(facts) == []


def test_the_path_follows_the_gpu() -> None:
    assert execution_path(CPU_ONLY).startswith("CPU only")
    assert execution_path(WITH_GPU).startswith("hybrid: RTX 4090")
    assert execution_path(without(WITH_GPU, "torch")).startswith("none")
    assert execution_path(CPU_ONLY).endswith("on 8 cores")
    assert execution_path(replace(CPU_ONLY, num_workers=5)).endswith("on 5 cores")


OLD_DRIVER = replace(WITH_GPU, gpu=None, driver="550.1", driver_cuda="12.4")


@pytest.mark.parametrize(
    ("facts", "what", "todo"),
    [
        (without(CPU_ONLY, "torch"), "torch is not installed", "pip install torch"),
        (without(CPU_ONLY, "numba"), "numba is not installed", "pip install numba"),
        (OLD_DRIVER, "driver knows CUDA 12.4, torch needs 13.0", "R580 or newer"),
        (replace(WITH_GPU, gpu=None, torch_cuda=None), "for the CPU only", "reinstall torch"),
        (replace(WITH_GPU, gpu=None), "sees no GPU", "CUDA_VISIBLE_DEVICES"),
        (
            replace(WITH_GPU, packages=WITH_GPU.packages | {"triton": "3.9.0"}),
            "wants triton 3.7.1, 3.9.0 is installed",
            "pip install triton==3.7.1",
        ),
        (
            replace(WITH_GPU, gpu=replace(WITH_GPU.gpu, capability="7.5")),
            "compute capability 7.5",
            "--device cpu",
        ),
        (replace(CPU_ONLY, has_avx2=False), "no AVX2", "GPU"),
        (replace(CPU_ONLY, isa_refusal="cannot run it"), "cannot run it", "unset FIDDLER_ISA"),
        (replace(CPU_ONLY, cache_is_writable=False), "/cache cannot be written", "HF_HOME"),
        (replace(CPU_ONLY, cache_free_bytes=GIB), "1.1 GB free", "HF_HOME"),
        (replace(CPU_ONLY, failures={"torch": "OSError: bad"}), "look at torch: OSError", "repair"),
    ],
)
def test_each_problem_says_what_to_do(facts: Facts, what: str, todo: str) -> None:
    (problem,) = find_problems(facts)
    assert what in problem.what
    assert todo in problem.todo


BUSY = replace(GOOD_LINK, copy_gbps=9.0)
NARROW = replace(GOOD_LINK, generation=3, width=8, copy_gbps=6.5)
HIDDEN = Link(generation=None, width=None, max_generation=None, max_width=None, copy_gbps=9.0)
READ_ONLY = Cache("/c", 0, is_writable=False, variable="NUMBA_CACHE_DIR")
NO_PINS = {"PCIe": "RuntimeError: CUDA error: out of memory"}


@pytest.mark.parametrize(
    ("facts", "what", "todo", "effect"),
    [
        (
            replace(WITH_GPU, link=NARROW),
            "generation 3 x8 under load, generation 4 x16 is possible",
            "x16 slot",
            "at most 8 GB/s instead of 32",
        ),
        (replace(WITH_GPU, link=BUSY), "reach 9.0 of PCIe's 32 GB/s", "other programs", "slower"),
        (
            replace(WITH_GPU, link=None, failures=NO_PINS, memlock_bytes=64 << 10),
            "cannot be pinned: RuntimeError: CUDA error: out of memory (memlock: 64.0 KiB)",
            "memlock=-1",
            "five times as slow",
        ),
        (
            replace(WITH_GPU, gpu=replace(WITH_GPU.gpu, vram_free_bytes=15 * GIB)),
            "9.0 GiB of 24.0 GiB of VRAM are in use by others",
            "nvidia-smi",
            "fewer experts",
        ),
        (
            replace(CPU_ONLY, ram_total_bytes=64 * GIB, ram_available_bytes=20 * GIB),
            "20.0 GiB of 64.0 GiB of RAM are free",
            "close other programs",
            "from disk",
        ),
        (
            replace(CPU_ONLY, memory_nodes=2, allowed_nodes=1),
            "only 1 of 2 memory nodes",
            "--membind",
            "channels",
        ),
        (
            replace(WITH_GPU, gpu_node=1, cpu_nodes=[0]),
            "GPU is at NUMA node 1, the CPUs in use are at 0",
            "--cpunodebind=1",
            "between sockets",
        ),
        (replace(CPU_ONLY, huge_pages="never"), "switched off", "echo madvise", "3 % slower"),
        (
            replace(CPU_ONLY, caches={"CPU kernels": READ_ONLY}),
            "cache of CPU kernels, /c, cannot be written",
            "NUMBA_CACHE_DIR",
            "seconds",
        ),
        (
            replace(WITH_GPU, handoff="hostfunc", handoff_problems={"values": "error 801"}),
            "hand-off by values",
            "driver",
            "30 us",
        ),
        (
            replace(CPU_ONLY, rates_of="h200", why_not_own="it is not calibrated"),
            "rates of this machine: it is not calibrated",
            "fiddler calibrate",
            "by the rates of h200",
        ),
        (
            replace(CPU_ONLY, forced_isa="avx2", is_lesser_isa=True),
            "FIDDLER_ISA=avx2 keeps kernels from what this CPU has",
            "unset FIDDLER_ISA",
            "slower",
        ),
        (
            replace(CPU_ONLY, damaged=["/c/cpu.json cannot be used (why)"]),
            "/c/cpu.json cannot be used (why)",
            "fiddler calibrate, which measures for less than a minute and replaces it",
            "anew",
        ),
    ],
)
def test_what_costs_speed_says_how_much(facts: Facts, what: str, todo: str, effect: str) -> None:
    (problem,) = find_problems(facts)
    assert what in problem.what and todo in problem.todo and effect in problem.effect
    assert not problem.is_fatal


@pytest.mark.parametrize(
    "facts",
    [
        replace(WITH_GPU, link=HIDDEN),
        replace(WITH_GPU, link=None),
        replace(WITH_GPU, gpu_node=1, cpu_nodes=[0, 1], memory_nodes=2, allowed_nodes=2),
        replace(CPU_ONLY, huge_pages="madvise", memlock_bytes=64 << 10),
        replace(CPU_ONLY, failures=NO_PINS),
        replace(CPU_ONLY, ram_total_bytes=64 * GIB, ram_available_bytes=40 * GIB),
    ],
)
def test_what_is_in_order_or_unknown_is_no_problem(facts: Facts) -> None:
    assert find_problems(facts) == []


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
    monkeypatch.setattr(
        "fiddler.cli.doctor_facts.collect",
        lambda: replace(CPU_ONLY, huge_pages="never", rates_of="some"),
    )
    monkeypatch.setattr("offload.hardware.probe", lambda device="auto": RTX.hardware)
    keep_in(tmp_path, monkeypatch)
    if text is not None:  # which is a finding, and said nowhere else
        default_path().parent.mkdir()
        default_path().write_text(text)
    done = CliRunner().invoke(cli, ["doctor"])
    assert done.stderr == ""
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("  speed: "))
    found = re.match(r"  speed: writes ([\d.]+) tok/s instead of ([\d.]+), reads ", line)
    assert found is not None and 0.95 < float(found[1]) / float(found[2]) < 1
    (problem,) = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)["problems"]
    assert problem["cost"]["shape"] == "qwen3-30b-a3b"
    assert problem["cost"]["decode"] == pytest.approx(float(found[1]), rel=0.01)


def test_only_what_differs_is_said_twice() -> None:
    cost = Cost(
        shape="s", machine="m", decode=9.0, mended_decode=12.0, prefill=800.0, mended_prefill=800.1
    )
    said = "writes 9.0 tok/s instead of 12.0, reads 800 tok/s (s, by the rates of m)"
    assert cost_text(cost) == said


def test_every_problem_has_an_effect() -> None:
    worst = replace(
        without(WITH_GPU, "torch"),
        link=NARROW,
        isa_refusal="cannot",
        has_avx2=False,
        huge_pages="never",
        cache_is_writable=False,
        cache_free_bytes=GIB,
    )
    found = find_problems(worst)
    assert len(found) == 7
    assert all(problem.effect and problem.todo for problem in found)


def test_what_a_link_carries() -> None:
    assert link_gbps(5, 16) == pytest.approx(63.0, abs=0.1)
    assert link_gbps(3, 4) == pytest.approx(3.94, abs=0.01)
    assert link_gbps(9, 16) == 0.0


@pytest.mark.parametrize(
    ("text", "word"), [("always [madvise] never\n", "madvise"), ("[never]", "never"), ("", None)]
)
def test_the_word_in_brackets(text: str, word: str | None) -> None:
    assert chosen_word(text) == word


def test_a_cache_is_measured_where_it_is_or_will_be(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"123")
    (tmp_path / "two").write_bytes(b"4567")
    found = cache_of(tmp_path, "V")
    assert (found.num_bytes, found.is_writable, found.variable) == (7, True, "V")
    assert cache_of(tmp_path / "none" / "yet", "V").num_bytes == 0
    assert not cache_of(tmp_path / "two" / "below", "V").is_writable


def test_the_table_shows_pages_nodes_and_caches() -> None:
    full = replace(
        WITH_GPU,
        numa_nodes=2,
        gpu_node=1,
        huge_pages="madvise",
        memlock_bytes=64 << 10,
        caches={"CPU kernels": Cache("/c", 5 << 20, is_writable=True, variable="V")},
    )
    rows = facts_rows(full)
    assert rows["NUMA"] == "2 nodes, the GPU at node 1"
    assert rows["pages"] == "huge ones: madvise; 64.0 KiB may be locked"
    assert rows["caches"] == "CPU kernels 5.0 MiB in /c"


@pytest.mark.gpu
def test_the_link_is_seen_at_work() -> None:
    link = measure_link()
    print(link)
    assert link.copy_gbps > 1
    if link.generation and link.width:
        assert link.copy_gbps < 1.02 * link_gbps(link.generation, link.width)


def test_the_worst_comes_first() -> None:
    facts = replace(without(CPU_ONLY, "torch"), cache_is_writable=False, has_avx2=False)
    assert [problem.is_fatal for problem in find_problems(facts)] == [True, False, False]


def test_the_table_leaves_out_what_is_unknown() -> None:
    bare = Facts(fiddler="0.1", python="3.11", system="Linux", packages=CPU_ONLY.packages)
    assert set(facts_rows(bare)) == {"fiddler", "packages", "CUDA", "GPU"}
    rows = facts_rows(WITH_GPU)
    assert rows["KV cache"] == "bfloat16, fp8, int8, int4"
    assert WITH_GPU.gpu is not None
    old = replace(WITH_GPU, gpu=replace(WITH_GPU.gpu, capability="8.6"))
    assert facts_rows(old)["KV cache"] == "bfloat16, int8, int4"
    assert rows["GPU"] == ("RTX 4090, 22.5 GiB of 24.0 GiB free, capability 8.9")
    assert rows["PCIe"] == "generation 4 x16 under load, at most 4 x16, copies at 26.5 GB/s"
    assert rows["CUDA"] == "driver 580.65 (up to CUDA 13.0), torch built for 13.0"
    forced = facts_rows(replace(CPU_ONLY, isa="kernels: avx2", forced_isa="avx2", num_workers=5))
    assert forced["ISA"] == "kernels: avx2, forced by FIDDLER_ISA"
    assert forced["workers"] == "5 (measured)"


# --- this machine ---


@pytest.mark.parametrize("missing", ["torch", "psutil", "numba", "huggingface_hub"])
def test_a_missing_package_hides_nothing_else(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    plain_import, plain_version = builtins.__import__, doctor_facts._version

    def importing(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return plain_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    monkeypatch.setattr(
        doctor_facts, "_version", lambda name: None if name == missing else plain_version(name)
    )
    facts = collect()
    assert facts.packages[missing] is None
    assert facts.ram_total_bytes
    assert facts.physical_cores
    assert not [p for p in find_problems(facts) if "could not look" in p.what]


def test_doctor_prints_json_of_this_machine() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--json"])
    record = json.loads(result.stdout)
    assert record["packages"]["torch"]
    assert record["ram_total_bytes"] > 0
    assert record["failures"] == {}
    assert set(record["caches"]) == {"CPU kernels", "GPU kernels", "measurements"}
    assert all("effect" in problem for problem in record["problems"])
    assert result.exit_code == int(any(problem["is_fatal"] for problem in record["problems"]))


@pytest.mark.parametrize(("level", "code"), [("plain", 0), ("mmx", 1)])
def test_doctor_tells_of_a_forced_path(level: str, code: int) -> None:
    """In a process of its own: the variable is read when the kernels are imported."""
    ran = subprocess.run(
        [sys.executable, "-m", "fiddler", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"FIDDLER_ISA": level},
    )
    record = json.loads(ran.stdout)
    assert ran.returncode == code
    assert record["forced_isa"] == level
    assert record["failures"] == {}
    assert not any("AVX2" in problem["what"] for problem in record["problems"])
    refusal = "FIDDLER_ISA must be one of plain, avx2, avxvnni, avx512, not 'mmx'."
    assert record["isa_refusal"] == (refusal if code else None)


def test_a_forced_path_that_cannot_be_is_one_sentence() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fiddler", "generate", "hello"],
        capture_output=True,
        text=True,
        env=os.environ | {"FIDDLER_ISA": "mmx"},
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        "error: FIDDLER_ISA must be one of plain, avx2, avxvnni, avx512, not 'mmx'.\n"
        "hint: unset FIDDLER_ISA: the best path is then taken\n"
    )


def keep_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("offload.calibration.cache_file", cache_file)


GARBAGE = ["", "{", "[]", "null", '{"format": 1}', "[" * 100_000, "\x00", '{"machine": 3}']


@pytest.mark.parametrize("text", GARBAGE)
def test_damaged_measurements_are_findings(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_in(tmp_path, monkeypatch)
    (tmp_path / "fiddler").mkdir()
    files = [tmp_path / "fiddler" / name for name in ("calibration.json", "cpu.json")]
    for file in files:
        file.write_text(text)
    facts = collect()
    assert facts.failures == {} and len(facts.damaged) == 2
    said = [problem.what for problem in find_problems(facts)]
    for file in files:
        assert any(what.startswith(f"{file} cannot be used (") for what in said), said


def test_a_machine_that_was_never_calibrated_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_in(tmp_path, monkeypatch)
    facts = collect()
    assert facts.damaged == [] and facts.why_not_own == "this machine is not calibrated"
    measured_num_threads()
    assert collect().damaged == [] and why_damaged(cache_file()) == ""


def test_doctor_prints_a_table() -> None:
    result = CliRunner().invoke(cli, ["doctor"])
    assert "RAM  " in result.stdout
    assert "path  " in result.stdout


texts = st.lists(st.text("abc-/.,", min_size=1, max_size=12), min_size=1).map(" ".join)


@given(label=st.text("xy: ", min_size=1, max_size=9), text=texts, width=st.integers(10, 80))
def test_lines_break_between_words(label: str, text: str, width: int) -> None:
    first, *others = wrapped(label, text, width)
    lines = [first.removeprefix(label), *(line.removeprefix(" " * len(label)) for line in others)]
    assert " ".join(lines) == text
    for line in lines:
        assert len(label) + len(line) <= width or " " not in line


def test_doctor_keeps_to_the_columns_of_a_terminal(tmp_path: Path) -> None:
    """But for paths, which are words however long they are."""
    with terminal([sys.executable, "-m", "fiddler", "doctor"], tmp_path, COLUMNS="50") as doctor:
        doctor.exit_code()
        lines = doctor.transcript.splitlines()
    assert any(line.startswith("packages ") for line in lines)
    for line in lines:
        assert len(line) <= 50 or len(line.split()) <= 2, line


def test_the_hand_off_is_named_and_what_hinders_a_faster_one() -> None:
    slow = replace(WITH_GPU, handoff="hostfunc", handoff_problems={"values": "CUDA error 801"})
    assert facts_rows(slow)["hand-off"].startswith("hostfunc:")
    assert "hand-off" not in facts_rows(CPU_ONLY)
    (problem,) = find_problems(slow)
    assert "by values does not work: CUDA error 801" in problem.what and not problem.is_fatal

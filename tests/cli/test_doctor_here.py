"""``fiddler doctor`` looks at this machine, whatever it lacks and however it is damaged."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from doctor_machines import keep_in

from cpu_kernels.thread_count import cache_file, measured_num_threads, why_damaged
from fiddler.cli import cli, doctor_facts
from fiddler.cli.doctor_checks import find_problems
from fiddler.cli.doctor_facts import collect
from fiddler.cli.doctor_memory import cache_of, chosen_word


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

"""What was measured is measured once: files that are whole, of this machine, or measured anew."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpu_kernels.expert_pool import ExpertPool
from cpu_kernels.experts import dense_experts
from cpu_kernels.thread_count import cache_file
from cpu_kernels.times import TimeTable
from offload import calibration, prefill_costs
from offload.calibration import (
    Calibration,
    Quantity,
    default_folder,
    file_name,
    machine_facts,
)
from offload.hardware import probe
from offload.prefill_costs import COPY_TIME, EXPERT_TIMES, known_costs


def _number(found: Any) -> float:
    if not isinstance(found, float):
        raise ValueError("no number")
    return found


SPEED = Quantity("speed", float, _number)
MACHINE = {"cpu": "some", "cores": [0, 1]}
SUBJECT = {"size": (3, 4)}


def counting(results: list[float]) -> Callable[[], float]:
    """A measurement that gives another result each time."""
    left = iter(results)
    return lambda: next(left)


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_the_second_start_reads_what_the_first_has_measured(tmp_path: Path) -> None:
    measure = counting([0.1 + 0.2])
    folder = tmp_path / "new" / "measured"
    first = Calibration(folder, MACHINE).once(SPEED, SUBJECT, measure)
    second = Calibration(folder, dict(reversed(MACHINE.items()))).once(SPEED, SUBJECT, measure)
    assert first == second == 0.1 + 0.2
    assert json.loads(only_file(folder).read_text())["of"]["machine"] == MACHINE


@pytest.mark.parametrize(
    ("machine", "subject"), [({"cpu": "other"}, SUBJECT), (MACHINE, {"size": (3, 5)})]
)
def test_anything_else_is_measured_too(
    tmp_path: Path, machine: dict[str, Any], subject: dict[str, Any]
) -> None:
    Calibration(tmp_path, MACHINE).once(SPEED, SUBJECT, lambda: 1.0)
    assert Calibration(tmp_path, machine).once(SPEED, subject, lambda: 2.0) == 2.0
    assert Calibration(tmp_path, MACHINE).once(SPEED, SUBJECT, lambda: 3.0) == 1.0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"of": {}, "found": 1.0}', "[" * 100_000, "\x00"]
)
def test_a_damaged_file_is_measured_anew_and_said(tmp_path: Path, text: str) -> None:
    known = Calibration(tmp_path, MACHINE)
    known.once(SPEED, SUBJECT, lambda: 1.0)
    only_file(tmp_path).write_text(text)
    with pytest.warns(RuntimeWarning, match=r"speed is measured anew"):
        assert known.once(SPEED, SUBJECT, lambda: 2.0) == 2.0
    assert known.once(SPEED, SUBJECT, lambda: 3.0) == 2.0


def test_a_result_of_another_kind_is_damage(tmp_path: Path) -> None:
    known = Calibration(tmp_path, MACHINE)
    known.once(SPEED, SUBJECT, lambda: 1.0)
    path = only_file(tmp_path)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "found": "fast"}))
    with pytest.warns(RuntimeWarning, match="no number"):
        assert known.once(SPEED, SUBJECT, lambda: 2.0) == 2.0


def test_of_two_that_measure_at_once_both_take_the_first(tmp_path: Path) -> None:
    known = Calibration(tmp_path, MACHINE)

    def measure_while_another_does() -> float:
        known.once(SPEED, SUBJECT, lambda: 1.0)
        return 2.0

    assert known.once(SPEED, SUBJECT, measure_while_another_does) == 1.0


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = Calibration(tmp_path / "file" / "measured", MACHINE)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert known.once(SPEED, SUBJECT, lambda: 1.0) == 1.0


def test_names_depend_on_facts_and_not_on_their_order() -> None:
    assert file_name("a", {"b": 1, "c": [2]}) == file_name("a", {"c": [2], "b": 1})
    assert file_name("a", {"b": 1}) != file_name("a", {"b": 2}) != file_name("c", {"b": 2})


def test_the_folder_lies_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "cache_file", cache_file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fiddler" / "measured"


def test_facts_of_this_machine_go_through_json() -> None:
    facts = machine_facts(probe("cpu"), "1.2")
    assert facts["version"] == "1.2" and facts["cpu_sources"] and facts["cpu"]
    assert json.loads(json.dumps(facts)) == facts


def test_expert_times_and_copies_come_back_bit_for_bit(tmp_path: Path) -> None:
    table = TimeTable(
        kernel="bf16/bf16", hidden=8, width=4, tokens=(1, 8), own_s=(1 / 3, 0.5), handed_s=None
    )
    for _ in range(2):
        known = Calibration(tmp_path, MACHINE)
        assert known.once(EXPERT_TIMES, SUBJECT, lambda: table) == table
        assert known.once(COPY_TIME, SUBJECT, lambda: 1 / 3) == 1 / 3


@pytest.mark.parametrize("found", [None, [], "x", {"tokens": [1]}, {"tokens": 3}])
def test_what_is_no_table_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="no table"):
        EXPERT_TIMES.from_json(found)


@pytest.mark.parametrize("found", [None, "x", 0.0, -1.0, float("nan"), float("inf"), 1])
def test_what_is_no_time_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match="no number of seconds"):
        COPY_TIME.from_json(found)


class Link:
    """A ring that says when it was busy, and for how long it copies."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def kept_busy(self, layer: int) -> Any:
        self.log.append(f"busy {layer}")
        return nullcontext()

    def seconds_per_expert(self, layer: int) -> float:
        self.log.append(f"copied {layer}")
        return 0.25


def test_costs_of_a_second_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_costs, "TOKENS", (1, 8))
    monkeypatch.setattr(prefill_costs, "BUDGET_S", 0.01)
    draw = np.random.default_rng(1)
    experts = dense_experts(
        draw.standard_normal((2, 32, 32), np.float32), draw.standard_normal((2, 32, 16), np.float32)
    )
    found = []
    with ExpertPool(1) as pool:
        for _ in range(2):
            link: Any = Link()
            known = Calibration(tmp_path, MACHINE)
            costs = known_costs(known, pool, experts, "f32", link, 5)
            found.append((costs.copy_s, costs.expert_s(8), costs.hand_over, link.log))
    assert found[0] == (0.25, found[1][1], None, ["busy 5", "copied 5"])
    assert found[1] == (0.25, found[0][1], None, [])

"""What was measured is measured once: of this machine and these versions, or else anew."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from offload.calibration import Calibration, Quantity, default_path, key_of
from offload.hardware import probe
from offload.machine_facts import Machine, this_machine
from offload.prefill_costs import COPY_TIME, EXPERT_TIMES, known_costs


def _number(found: Any) -> float:
    if not isinstance(found, float):
        raise ValueError("no number")
    return found


SPEED = Quantity("speed", float, _number)
MACHINE = Machine({"cpu_name": "some CPU", "cores": [0, 1]}, {"torch": "1", "cpu_kernels": "a"})
OTHER = Machine({"cpu_name": "other CPU", "gpu_name": "some GPU"}, MACHINE.versions)
NEWER = Machine(MACHINE.hardware, {"torch": "2", "cpu_kernels": "a"})
SUBJECT = {"size": (3, 4)}


def counting(results: list[float]) -> Callable[[], float]:
    """A measurement that gives another result each time."""
    left = iter(results)
    return lambda: next(left)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "calibration.json"


def test_the_second_start_reads_what_the_first_has_measured(path: Path) -> None:
    measure = counting([0.1 + 0.2])
    first = Calibration(path, MACHINE).once(SPEED, SUBJECT, measure)
    again = Machine(dict(reversed(MACHINE.hardware.items())), MACHINE.versions)
    assert first == Calibration(path, again).once(SPEED, SUBJECT, measure) == 0.1 + 0.2
    (section,) = json.loads(path.read_text())["machines"]
    assert section["hardware"] == MACHINE.hardware


@pytest.mark.parametrize(("machine", "subject"), [(OTHER, SUBJECT), (MACHINE, {"size": (3, 5)})])
def test_anything_else_is_measured_too(
    path: Path, machine: Machine, subject: dict[str, Any]
) -> None:
    Calibration(path, MACHINE).once(SPEED, SUBJECT, lambda: 1.0)
    assert Calibration(path, machine).once(SPEED, subject, lambda: 2.0) == 2.0
    assert Calibration(path, MACHINE).once(SPEED, SUBJECT, lambda: 3.0) == 1.0


def test_other_versions_are_measured_anew_and_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Calibration(path, OTHER).once(SPEED, SUBJECT, lambda: 5.0)
    Calibration(path, MACHINE).once(SPEED, SUBJECT, lambda: 1.0)
    newer = Calibration(path, NEWER)
    assert "torch 1 then, 2 now" in newer.why_unknown(SPEED, SUBJECT) and not caplog.text
    assert newer.once(SPEED, SUBJECT, lambda: 2.0) == 2.0
    assert "torch 1 then, 2 now" in caplog.text
    assert newer.once(SPEED, SUBJECT, lambda: 3.0) == 2.0
    assert Calibration(path, OTHER).once(SPEED, SUBJECT, lambda: 6.0) == 5.0


def test_who_only_asks_is_not_told_of_a_measurement(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a plan does, which measures nothing."""
    Calibration(path, MACHINE).store(SPEED, SUBJECT, 1.0)
    kept = path.read_bytes()
    assert Calibration(path, NEWER).known(SPEED, SUBJECT) is None
    assert caplog.messages == [
        f"{path} is of other versions (torch 1 then, 2 now): all has to be measured anew"
    ]
    assert path.read_bytes() == kept


def test_measuring_again_takes_the_place_of_what_was_there(path: Path) -> None:
    known = Calibration(path, MACHINE)
    assert known.store(SPEED, SUBJECT, 1.0) == 1.0
    assert known.store(SPEED, SUBJECT, 2.0) == 2.0
    assert known.known(SPEED, SUBJECT) == 2.0


def test_what_is_outdated(path: Path) -> None:
    known, newer = Calibration(path, MACHINE), Calibration(path, NEWER)
    assert not known.is_outdated(SPEED)  # never measured
    Calibration(path, OTHER).store(SPEED, SUBJECT, 1.0)
    assert known.is_outdated(SPEED) and not known.is_outdated(COPY_TIME)
    known.store(COPY_TIME, SUBJECT, 1.0)
    assert not known.is_outdated(SPEED)  # here it never was
    known.store(SPEED, SUBJECT, 1.0)
    assert not known.is_outdated(SPEED) and newer.is_outdated(SPEED)
    newer.store(SPEED, SUBJECT, 1.0)
    assert not newer.is_outdated(SPEED) and known.is_outdated(SPEED)


def test_why_something_is_unknown(path: Path) -> None:
    known = Calibration(path, MACHINE)
    assert known.why_unknown(SPEED, SUBJECT) == "this machine is not calibrated"
    Calibration(path, OTHER).store(SPEED, SUBJECT, 1.0)
    why = f"{path} is of another machine (other CPU with some GPU)"
    assert known.why_unknown(SPEED, SUBJECT) == why
    known.store(SPEED, SUBJECT, 1.0)
    assert known.why_unknown(SPEED, SUBJECT) == ""
    assert known.why_unknown(COPY_TIME, SUBJECT) == "this machine is not calibrated"
    said = known.why_unknown(SPEED, SUBJECT | {"way": "b"})
    assert said == "it was calibrated with other settings (way none then, b now)"
    text = path.read_text()
    path.write_text(text.replace("1.0", "null"))
    assert known.why_unknown(SPEED, SUBJECT) == f"what {path} has of it cannot be used"


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "{}", "[" * 100_000, "\x00", '{"format": 2, "machines": []}'),
        *('{"format": 1}', '{"format": 1, "machines": [1]}', '{"format": 1, "machines": [{}]}'),
    ],
)
def test_a_damaged_file_is_measured_anew_and_said(path: Path, text: str) -> None:
    known = Calibration(path, MACHINE)
    known.once(SPEED, SUBJECT, lambda: 1.0)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"cannot be used .* measured anew"):
        assert known.once(SPEED, SUBJECT, lambda: 2.0) == 2.0
    assert known.once(SPEED, SUBJECT, lambda: 3.0) == 2.0


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [("found", "fast", "no number"), ("of", {"size": 1}, "something else")],
)
def test_a_result_of_another_kind_is_damage(
    path: Path, field: str, value: Any, complaint: str
) -> None:
    known = Calibration(path, MACHINE)
    known.once(SPEED, SUBJECT, lambda: 1.0)
    record = json.loads(path.read_text())
    record["machines"][0]["measured"][key_of("speed", SUBJECT)][field] = value
    path.write_text(json.dumps(record))
    with pytest.warns(RuntimeWarning, match=complaint):
        assert known.once(SPEED, SUBJECT, lambda: 2.0) == 2.0
    assert known.once(SPEED, SUBJECT, lambda: 3.0) == 2.0


def test_of_two_that_measure_at_once_both_take_the_first(path: Path) -> None:
    known = Calibration(path, MACHINE)

    def measure_while_another_does() -> float:
        known.once(SPEED, SUBJECT, lambda: 1.0)
        return 2.0

    assert known.once(SPEED, SUBJECT, measure_while_another_does) == 1.0


def test_nothing_is_lost_where_many_store_at_once(path: Path) -> None:
    def store(number: int) -> None:
        machine = (MACHINE, OTHER)[number % 2]
        Calibration(path, machine).store(SPEED, {"number": number}, float(number))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(store, range(24)))
    for number in range(24):
        machine = (MACHINE, OTHER)[number % 2]
        assert Calibration(path, machine).known(SPEED, {"number": number}) == number


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    known = Calibration(tmp_path / "file" / "calibration.json", MACHINE)
    with pytest.warns(RuntimeWarning, match="cannot be written .* XDG_CACHE_HOME"):
        assert known.once(SPEED, SUBJECT, lambda: 1.0) == 1.0


def test_keys_depend_on_facts_and_not_on_their_order() -> None:
    assert key_of("a", {"b": 1, "c": [2]}) == key_of("a", {"c": [2], "b": 1})
    assert key_of("a", {"b": 1}) != key_of("a", {"b": 2}) != key_of("c", {"b": 2})


def test_the_file_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "cache_file", cache_file)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path() == tmp_path / "fiddler" / "calibration.json"


def test_facts_of_this_machine_go_through_json() -> None:
    machine = this_machine(probe("cpu"), "1.2")
    assert machine.versions["fiddler"] == "1.2" and machine.versions["cpu_kernels"]
    assert machine.versions["torch"] and machine.hardware["cpu_name"] in machine.name
    for facts in (machine.hardware, machine.versions):
        assert json.loads(json.dumps(facts)) == facts


def test_expert_times_and_copies_come_back_bit_for_bit(path: Path) -> None:
    table = TimeTable(
        kernel="bf16/bf16", hidden=8, width=4, tokens=(1, 8), rows_s=(1 / 3, 0.5), columns_s=None
    )
    for _ in range(2):
        known = Calibration(path, MACHINE)
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


def test_costs_of_a_second_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            known = Calibration(path, MACHINE)
            costs = known_costs(known, pool, experts, "f32", link, 5)
            found.append((costs.copy_s, costs.expert_s(8), costs.columns_from, link.log))
    assert found[0] == (0.25, found[1][1], None, ["busy 5", "copied 5"])
    assert found[1] == (0.25, found[0][1], None, [])

"""Whatever goes wrong: one sentence, the model that was there stays, and --resume goes on.

One run replaces an earlier model in ``out``; each test lets it fail in another way.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fiddler.cli import cli
from fiddler.errors import FiddlerError, QuantizeError
from fiddler.quantize.target import JOURNAL
from tests.quantize.conftest import Quantize
from tests.quantize.test_run import EXPERT, Stop, changed, contents, stop_at

NAME = f"{EXPERT}.up_proj.weight"


@pytest.fixture
def old(run: Quantize, tmp_path: Path) -> Path:
    """The earlier model, of another scheme than those that follow."""
    return run("w8g64", output=tmp_path / "out").folder


@contextmanager
def kept(old: Path) -> Iterator[None]:
    """Within, nothing in the earlier model changes."""
    before = contents(old)
    yield
    assert contents(old) == before


def refused(run: Quantize, said: str, **options: Any) -> None:
    """In one sentence, whose hint is another."""
    with pytest.raises(FiddlerError, match=said) as caught:
        run(**options)
    assert "\n" not in f"{caught.value}{caught.value.hint or ''}"


@pytest.mark.parametrize("sensitivity", [None, 0.35])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(
    run: Quantize, tiny: Path, text: Path, tmp_path: Path, old: Path, bad: float, sensitivity: Any
) -> None:
    broken = changed(tiny, tmp_path / "bad", lambda tensors: tensors[NAME][0, 3].fill_(bad))
    said = f"{NAME} .* holds NaN or Inf"
    with kept(old):
        options = {"calibration": text, "sensitivity": sensitivity}
        refused(run, said, kind="w4g32", source=broken, **options)


def test_a_group_that_does_not_divide(run: Quantize, old: Path) -> None:
    with kept(old):
        refused(run, "groups of 128 do not divide the hidden size of 64", kind="w4g128")
    assert not old.with_name("out.partial").exists()


def test_a_text_shorter_than_one_window(run: Quantize, tmp_path: Path, old: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with kept(old):
        said = "has 9 tokens, less than one window of 32"
        refused(run, said, calibration=tmp_path / "short.txt", method="gptq")
    assert not old.with_name("out.partial").exists()


@pytest.mark.parametrize("cut", [1, 100_000])
def test_output_that_was_truncated(run: Quantize, tmp_path: Path, old: Path, cut: int) -> None:
    """A finished file that is shorter than its journal says is made again."""
    wanted = contents(run("w4g32", output=tmp_path / "whole").folder)
    with kept(old), pytest.raises(Stop):
        run("w4g32", on_progress=stop_at(20))
    victim = sorted((tmp_path / "out.partial").glob("*.safetensors"))[1]
    os.truncate(victim, max(0, victim.stat().st_size - cut))
    assert contents(run("w4g32", resume=True).folder) == wanted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full(
    run: Quantize, tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """While a file is written: what is there of it is written anew."""
    import fiddler.quantize.writing as writing

    wanted = contents(run("w4g32", output=tmp_path / "whole").folder)
    files = 0

    def full(descriptor: int) -> None:
        nonlocal files
        files += 1
        if files == 8:  # journals are synchronised too
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, kept(old):
        patch.setattr(writing.os, "fsync", full)
        refused(run, r"the disk of .* is full, \d+\.\d+ MB more are needed", kind="w4g32")
    assert contents(run("w4g32", resume=True).folder) == wanted


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_on_which_nothing_can_be_begun(
    run: Quantize, tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Not even a journal: a new run leaves nothing, one that goes on leaves what there was."""
    import fiddler.quantize.target as target

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    def refuses(**options: Any) -> None:
        with monkeypatch.context() as patch, kept(old):
            patch.setattr(target.os, "fsync", full)
            refused(run, r"out\.partial (is full|takes no file of)", kind="w4g32", **options)

    refuses()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(Stop):
        run("w4g32", on_progress=stop_at(20))
    refuses(resume=True)
    assert run("w4g32", resume=True).num_experts == 24


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_said_with_the_way_out(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(QuantizeError, match=r"out\.partial cannot be written: ") as caught:
        run("w4g32")
    assert caught.value.hint == "choose an -o in a folder that can be written"
    assert not list(tmp_path.iterdir())


def test_a_limit_of_file_sizes(tiny: Path, tmp_path: Path) -> None:
    """Such as some disks have too."""
    arguments = ["quantize", str(tiny), "--scheme", "w4g32", "-o", str(tmp_path / "out")]
    limited = 'ulimit -f 64 && exec "$0" -m fiddler "$@"'
    done = subprocess.run(
        ["bash", "-c", limited, sys.executable, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 1 and "out.partial takes no file of " in done.stderr
    assert "raise the limit and run the same command with --resume" in done.stderr
    again = CliRunner().invoke(cli, [*arguments, "--resume"])
    assert again.exit_code == 0, again.output


JUNK: list[Any] = [None, True, 4, "x", [], [4], {"x": 4}]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_a_journal_that_was_damaged(run: Quantize, tmp_path: Path, junk: Any) -> None:
    """What is no journal is named; what is said of a file in another way is not believed."""
    with pytest.raises(Stop):
        run("w4g32", on_progress=stop_at(20))
    journal = tmp_path / "out.partial" / JOURNAL
    whole = json.loads(journal.read_text())
    for field in ("job", "finished"):
        if not isinstance(junk, dict):
            journal.write_text(json.dumps(whole | {field: junk}))
            refused(run, f"{JOURNAL} is damaged: '{field}'", kind="w4g32", resume=True)
    journal.write_text(json.dumps(junk))
    refused(run, f"{JOURNAL} is damaged", kind="w4g32", resume=True)
    journal.write_text(json.dumps(whole | {"finished": dict.fromkeys(whole["finished"], junk)}))
    assert run("w4g32", resume=True).num_experts == 24


@pytest.mark.parametrize("left", [[], [f"{JOURNAL}.new"]])
def test_a_run_that_ended_before_its_journal_is_in_nobodys_way(
    run: Quantize, tmp_path: Path, left: list[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    for name in left:
        (tmp_path / "out.partial" / name).write_text("{")
    assert run("w4g32").num_experts == 24
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_full_disk_asks_for_is_what_going_on_takes(
    run: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 10 KB; what a half-written file takes comes back when it is written anew."""
    import fiddler.quantize.layers as layers

    write = layers.write_shard

    def full(path: Path, *rest: Any) -> None:
        write(path, *rest)
        if "00003" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(QuantizeError) as caught:
        patch.setattr(layers, "write_shard", full)
        run("w4g32")
    (asked,) = re.findall(r"^free (\d+\.\d+) MB and run the same command", caught.value.hint)
    enough = int(float(asked) * 1e6) + 10_000
    monkeypatch.setattr("fiddler.quantize.target.free_bytes", lambda folder: enough - 20_000)
    refused(run, "more on the disk", kind="w4g32", resume=True)
    monkeypatch.setattr("fiddler.quantize.target.free_bytes", lambda folder: enough)
    assert run("w4g32", resume=True).num_experts == 24


STOP_AFTER_TWO = """
import time
from fiddler.cli import cli
from fiddler.quantize import layers

write, written = layers.write_shard, []

def write_two(*arguments):
    if len(written) == 2:
        time.sleep(600)
    written.append(write(*arguments))

layers.write_shard = write_two
cli()
"""


def test_a_process_that_was_killed_half_way(
    run: Quantize, tiny: Path, tmp_path: Path, old: Path
) -> None:
    """By a signal that nobody can catch, once a layer is on the disk."""
    wanted = contents(run("w4g32", output=tmp_path / "whole").folder)
    arguments = ["quantize", str(tiny), "--scheme", "w4g32", "-o", str(tmp_path / "out")]
    with kept(old):
        child = subprocess.Popen([sys.executable, "-c", STOP_AFTER_TWO, *arguments])
        journal = tmp_path / "out.partial" / JOURNAL
        _wait_until(lambda: journal.exists() and "00002" in journal.read_text())
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
        again = CliRunner().invoke(cli, arguments)
    assert again.exit_code == 1
    assert "is what an interrupted run left" in again.stderr and "--resume" in again.stderr
    done = CliRunner().invoke(cli, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert contents(old) == wanted


def _wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 100
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0.2", "w4g64 alone takes 0.2812 of bfloat16, more than 0.2"),
        ("nan", "the experts cannot take nan of what they take in bfloat16"),
        ("2", "the experts cannot take 2.0 of what they take in bfloat16"),
        ("much", "'much' is not a valid float"),
    ],
)
def test_sizes_that_make_no_sense(
    tiny: Path, text: Path, tmp_path: Path, value: str, said: str
) -> None:
    options = ["--scheme", "w4g64", "--calibration", str(text), "--sensitivity", value]
    done = CliRunner().invoke(cli, ["quantize", str(tiny), *options, "-o", str(tmp_path / "out")])
    assert done.exit_code in (1, 2) and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_layers_of_other_kinds_are_told(tiny: Path, text: Path, tmp_path: Path) -> None:
    options = ["--scheme", "w4g32", "--calibration", str(text), "--sensitivity", "0.37"]
    done = CliRunner().invoke(cli, ["quantize", str(tiny), *options, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "layers of w4g32: " in done.stderr and "; w8g64: " in done.stderr

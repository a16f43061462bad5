"""Two runs into one folder: the second is refused, and a killed one keeps nobody out."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from fiddler.errors import QuantizeError
from fiddler.quantize.lock import LOCK, hold
from tests.quantize.conftest import Quantize
from tests.quantize.test_run import contents

KILLED = """
import os, signal, sys
from pathlib import Path
from cpu_kernels.weight_kind import parse_kind
from fiddler.quantize.run import QuantizeJob, quantize

def die(what, done, total):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)

source, output = map(Path, sys.argv[1:])
quantize(QuantizeJob(source=source, output=output, kind=parse_kind("w4g32"), method="rtn"), die)
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_and_the_first_goes_on(
    run: Quantize, tmp_path: Path, resume: bool
) -> None:
    wanted = contents(run("w4g32", output=tmp_path / "whole").folder)
    refusals = []

    def second(what: str, done: int, total: int) -> None:
        if done in (1, 20):
            with pytest.raises(QuantizeError, match=r"another run is writing .*out\.partial") as no:
                run("w4g32", resume=resume)
            refusals.append(no.value.hint)

    made = run("w4g32", on_progress=second)
    assert refusals == ["wait until it has ended, or choose another -o"] * 2
    assert contents(made.folder) == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_who_has_just_begun_is_not_disturbed(run: Quantize, tmp_path: Path) -> None:
    """Before the first journal."""
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with hold(partial), pytest.raises(QuantizeError, match="another run is writing"):
        run("w4g32")
    assert [path.name for path in partial.iterdir()] == [LOCK]
    assert run("w4g32").num_experts == 24


def test_a_killed_run_is_gone_on_with(run: Quantize, tiny: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", KILLED, str(tiny), str(tmp_path / "out")]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial" / LOCK).exists()
    made = run("w4g32", resume=True)
    assert made.num_experts == 24 and not (made.folder / LOCK).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_written_to(
    run: Quantize, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unknown(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert run("w4g32").num_experts == 24


def test_a_folder_that_gets_its_name_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()

    def renames(file: IO[str], operation: int) -> None:
        partial.rename(tmp_path / "out")

    monkeypatch.setattr(fcntl, "flock", renames)
    with pytest.raises(QuantizeError, match="another run is writing"):
        hold(partial)

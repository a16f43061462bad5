"""``fiddler pull``, how progress is told, and a pipe that keeps a command waiting."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from fiddler.cli import cli, prompt_input
from fiddler.hub.resolve import BUILTIN_FOLDER
from fiddler.progress import amount_text


def test_pull_prints_the_folder() -> None:
    result = CliRunner().invoke(cli, ["pull", "builtin"])
    assert (result.exit_code, result.stdout) == (0, f"{BUILTIN_FOLDER}\n")


def test_pull_of_nonsense_is_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["pull", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {tmp_path} has no config.json")


def test_amounts_are_bytes_for_repositories_and_counts_otherwise() -> None:
    assert amount_text("org/name", 1_200_000_000, 61_100_000_000) == "1.2 GB of 61.1 GB"
    assert amount_text("layers", 3, 6144) == "3 of 6,144"
    assert amount_text("experts", 6 * 10**9, 6 * 10**10, 5.2e9) == "6.0 GB of 60.0 GB, 5.2 GB/s"


def test_a_pipe_that_keeps_silent_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_end, write_end = os.pipe()
    is_explained, note = threading.Event(), prompt_input.note

    def noted(text: str) -> None:
        note(text)
        is_explained.set()

    def speak() -> None:
        is_explained.wait(60)
        os.write(write_end, b"late\n")
        os.close(write_end)

    with os.fdopen(read_end) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr(prompt_input, "PATIENCE_S", 0.05)
        monkeypatch.setattr(prompt_input, "note", noted)
        speaker = threading.Thread(target=speak)
        speaker.start()
        assert prompt_input.full_prompt("say") == "say\n\nlate"
        speaker.join()
    assert "waiting for the end of standard input" in capsys.readouterr().err


def run_without(stream: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """As a daemon may run it; Python has None in place of a closed stream."""
    code = f"import sys; sys.{stream} = None; from fiddler.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(stream: str) -> None:
    done = run_without(stream, "pull", "builtin")
    assert done.stdout == ("" if stream == "stdout" else f"{BUILTIN_FOLDER}\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_an_answer_needs_no_stream(stream: str) -> None:
    done = run_without(stream, "generate", "hi", "--max-tokens", "3")
    assert bool(done.stdout) == (stream == "stderr")

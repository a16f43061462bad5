"""The kernels compile for the oldest GPUs, Hopper and Blackwell, which no interpreter can tell."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("sm", ["80", "90", "120"])
def test_compiles_without_a_gpu(sm: str) -> None:
    command = [sys.executable, "-m", "scripts.compile_kernels", "--sm", sm]
    done = subprocess.run(
        [*command, "--only", "small", "128 bfloat16", "few rows", "hand over"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


def test_prompts_in_float32_spill_nothing() -> None:
    """The driver takes local memory for all threads of a GPU, gigabytes for kilobytes of spills."""
    command = [sys.executable, "-m", "scripts.compile_kernels", "--only", "128 float32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spilled = [int(line.split()[-2]) for line in done.stdout.splitlines()[1:]]
    assert spilled and not any(spilled), done.stdout

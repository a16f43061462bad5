"""The kernels compile for the oldest GPUs and for Hopper, which no interpreter can tell."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("sm", ["80", "90"])
def test_compiles_without_a_gpu(sm: str) -> None:
    command = [sys.executable, "-m", "scripts.compile_kernels", "--sm", sm]
    done = subprocess.run(
        [*command, "--only", "small", "128 bfloat16"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5

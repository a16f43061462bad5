"""Tests run once more by the lesser levels of instructions that FIDDLER_ISA leaves."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm

from cpu_kernels.isa import LEVELS, VARIABLE, host_isa, isa_from_features


def can_run(level: str) -> bool:
    try:
        isa_from_features(platform.machine(), "", dict(llvm.get_host_cpu_features()), level)
    except ValueError:
        return False
    return level != host_isa().level


LESSER_LEVELS = [level for level in LEVELS if can_run(level)]


def passes(level: str, file: str, names: str) -> None:
    """Assert that the file's tests with such names pass by that level."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", names],
        env=os.environ | {VARIABLE: level},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

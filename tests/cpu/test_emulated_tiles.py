"""The code for AMX's tiles on CPUs that have none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpu_kernels.amx import may_use_tiles
from cpu_kernels.isa import host_isa

HERE = Path(__file__).parent


@pytest.mark.skipif(host_isa().level != "avx512", reason="tiles are used beside AVX-512")
@pytest.mark.skipif(may_use_tiles(), reason="this CPU has tiles")
def test_products_by_tiles(tmp_path: Path) -> None:
    files = [str(HERE / name) for name in ("test_columns.py", "test_lossless_columns.py")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-p", "emulated_tiles", *files, "-k", "not lesser"),
        ],
        env=os.environ | {"PYTHONPATH": str(HERE), "NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""What ``import fiddler`` does to the process."""

import os
import subprocess
import sys

import pytest

import fiddler


@pytest.mark.parametrize("given", [None, "7"])
def test_threads_of_torch_sleep_soon_unless_told_otherwise(given: str | None) -> None:
    """Else each of two programs on two cores writes a fiftieth; torch must not be there before."""
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    code = (
        "import os, sys, fiddler; assert 'torch' not in sys.modules;"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=others | ({"GOMP_SPINCOUNT": given} if given else {}),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.strip() == (given or "1000")


def test_completion_offers_the_public_names() -> None:
    assert set(fiddler.__all__) <= set(dir(fiddler))
    assert all(hasattr(fiddler, name) for name in dir(fiddler))

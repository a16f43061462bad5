"""A tiny model whose sizes groups of 32 and 64 divide, and a text of some windows for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels.weight_kind import parse_kind
from fiddler.quantize.run import QuantizedModel, QuantizeJob, quantize
from tests.tiny_models import shared_tiny

WINDOW = 32  # tokens, and bytes of the tiny models' texts

Quantize = Callable[..., QuantizedModel]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiddler.quantize.calibration.WINDOW", WINDOW)


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Do not change its files."""
    return shared_tiny("qwen3_moe", moe_intermediate_size=64)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} is not {i * i % 37}; " for i in range(60)))
    return path


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Quantize:
    """``run(kind, **options)``: quantise the tiny model into ``tmp_path / "out"``."""

    def quantized(kind: str = "w4g32z", **options: Any) -> QuantizedModel:
        on_progress = options.pop("on_progress", None)
        given = {"source": tiny, "output": tmp_path / "out", "method": "rtn"} | options
        return quantize(QuantizeJob(kind=parse_kind(kind), **given), on_progress)

    return quantized

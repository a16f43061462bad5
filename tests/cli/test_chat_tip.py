"""When a chat begins with what would be faster."""

from types import SimpleNamespace
from typing import Any

import pytest

from fiddler.cli.chat import _tip
from fiddler.config import EngineConfig
from offload.plan import GpuSide


def model(**changed: Any) -> Any:
    """One whose experts do not all fit a GPU."""
    facts = {"side": GpuSide.CUDA, "cold": 1, "dtype": "bfloat16", "packed": None} | changed
    return SimpleNamespace(
        plan=SimpleNamespace(
            gpu_side=facts["side"], memory=SimpleNamespace(cpu_experts=facts["cold"])
        ),
        model_config=SimpleNamespace(dtype=facts["dtype"], packed=facts["packed"]),
        config=EngineConfig(model="m", dtype=facts.get("asked", "auto")),
    )


def test_twelve_bits_are_proposed_where_they_help() -> None:
    assert "--dtype bf12" in _tip(model())


@pytest.mark.parametrize(
    "changed",
    [
        {"cold": 0},
        {"side": GpuSide.NONE},
        {"side": GpuSide.EMULATED},
        {"dtype": "float16"},  # would be rounded
        {"packed": "bf12"},
        {"asked": "bfloat16"},
        {"asked": "w4g128"},
    ],
)
def test_nothing_is_proposed_elsewhere(changed: dict[str, Any]) -> None:
    assert _tip(model(**changed)) == ""

"""Where kernels may start before the last one has ended."""

import pytest
import torch

from gpu_kernels import dependent_launch
from gpu_kernels.dependent_launch import dependent, followed

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("family", "version", "is_early"),
    [
        ("sm80", 13000, False),
        ("sm89", 13000, False),
        ("sm90", 13000, True),
        ("sm90", 12030, True),
        ("sm90", 12020, False),
        ("sm90", 0, False),
        ("sm120", 12080, True),
    ],
)
def test_by_family_and_driver(
    family: str, version: int, is_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependent_launch, "family", lambda device: family)
    monkeypatch.setattr(dependent_launch, "driver_version", lambda: version)
    assert dependent(GPU) == (
        {"DEPENDENT": True, "launch_pdl": True} if is_early else {"DEPENDENT": False}
    )
    assert followed(GPU) == {"DEPENDENT": is_early}


def test_without_a_gpu_none_starts_early() -> None:
    assert dependent(torch.device("cpu")) == followed(torch.device("cpu")) == {"DEPENDENT": False}


@pytest.mark.gpu
def test_the_driver_tells_its_version() -> None:
    assert dependent_launch.driver_version() >= 12000

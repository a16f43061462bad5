"""Which GPUs are refused, and what the others are called."""

import pytest
import torch

from gpu_kernels import device
from gpu_kernels.device import UnsupportedGpuError, family, family_of, require_supported


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), "sm80"),
        ((8, 6), "sm86"),
        ((8, 7), "sm86"),
        ((8, 9), "sm89"),
        ((9, 0), "sm90"),
        ((10, 0), "sm100"),
        ((10, 3), "sm100"),
        ((11, 0), "sm100"),
        ((12, 1), "sm120"),
        ((13, 0), "sm120"),
        ((7, 5), None),
        ((6, 1), None),
    ],
)
def test_a_gpu_belongs_to_the_newest_family_that_is_not_newer(
    capability: tuple[int, int], expected: str | None
) -> None:
    assert family_of(capability) == expected


class PretendGpus:
    """torch.cuda's questions about GPUs of these capabilities, counting them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
        self.asked = 0
        self.capabilities = capabilities
        monkeypatch.setattr(torch.cuda, "get_device_capability", self.capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Pretend {index}")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        device._cuda_family.cache_clear()

    def capability(self, index: int) -> tuple[int, int]:
        self.asked += 1
        return self.capabilities[index]


@pytest.fixture(autouse=True)
def forget_devices():
    yield
    device._cuda_family.cache_clear()


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendGpus(monkeypatch, (9, 0), (7, 5))
    require_supported("cuda:0")
    for ask in (require_supported, family):
        with pytest.raises(UnsupportedGpuError, match=r"Pretend 1 has .* 7\.5, but 8\.0 .* needed"):
            ask("cuda:1")


def test_each_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = PretendGpus(monkeypatch, (8, 6), (9, 0))
    names = ["cuda:0", torch.device("cuda", 1), "cuda", "cuda:1"]
    assert [family(name) for name in names] == ["sm86", "sm90", "sm86", "sm90"]
    assert gpus.asked == 2


def test_the_interpreter_counts_as_the_oldest_family() -> None:
    require_supported("cpu")
    assert family("cpu") == "sm80"


@pytest.mark.gpu
def test_this_gpu_has_a_family() -> None:
    require_supported("cuda")
    assert family("cuda") in device.FAMILIES.values()

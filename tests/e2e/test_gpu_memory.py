"""The VRAM budget is kept as the driver counts it, and everything is given back."""

import ctypes
import gc
import threading

import pytest
import torch

from fiddler import LLM, OutOfMemoryError, SamplingParams
from offload import nvml
from offload.gpu_probe import device_uuid
from offload.units import GIB

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def device_used_bytes() -> int:
    """By everybody, as the driver counts it: NVML is asked, which makes no CUDA context."""
    try:
        device = nvml.open_device(device_uuid(ctypes.CDLL("libcuda.so.1"), 0))
    except OSError:
        return 0  # collected where there is no GPU
    return device.used_bytes() if device else 0


BEFORE = device_used_bytes()  # tests are collected before any of them makes a CUDA context


def driver_used_bytes() -> int:
    """Of this process: nobody else uses the device while these tests run."""
    torch.cuda.synchronize()
    return device_used_bytes() - BEFORE


@pytest.mark.parametrize("vram_gb", [4.0, 6.0, 12.0])
def test_the_driver_never_counts_more_than_the_budget(vram_gb: float) -> None:
    with LLM(
        "olmoe-1b-7b", load_format="dummy", vram_gb=vram_gb, max_num_seqs=4, max_model_len=2048
    ) as llm:
        assert llm.plan.placement.num_resident > 0
        prompts = [[i * 37 % 50_000 for i in range(n)] for n in (1800, 700, 16, 1)]
        outputs = llm.generate(prompts, PARAMS)
        # the allocator keeps what it ever reserved, so now is the peak
        used, said = driver_used_bytes(), outputs[0].stats.peak_vram_bytes
        print(f"{used / GIB:.3f} GiB used, {said / GIB:.3f} said, {BEFORE / GIB:.3f} before")
        assert used <= vram_gb * GIB
        assert said == pytest.approx(used, rel=0.1)
        # what was planned to be used is used: no large part of the budget lies idle by mistake
        if llm.plan.placement.num_resident < 16 * 64:
            assert used >= 0.8 * vram_gb * GIB


def test_float32_keeps_the_budget_too() -> None:
    """Kernels whose float32 tiles spill would take local memory beside it."""
    options = {"load_format": "dummy", "vram_gb": 8.0, "max_num_seqs": 4, "max_model_len": 2048}
    with LLM("olmoe-1b-7b", dtype="float32", **options) as llm:
        before = driver_used_bytes()
        llm.generate([[i * 37 % 50_000 for i in range(n)] for n in (1800, 700, 16, 1)], PARAMS)
        used = driver_used_bytes()
        print(f"{before / GIB:.2f} GiB after loading, {used / GIB:.2f} after prompts")
        assert used <= 8 * GIB


def test_close_gives_back_gpu_memory_pinned_memory_and_threads() -> None:
    torch.cuda.init()
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
    threads = threading.active_count()
    with LLM("builtin", vram_gb=2) as llm:
        llm.generate([1, 2, 3], PARAMS)
    gc.collect()
    torch.cuda.empty_cache()
    base, allocated = driver_used_bytes(), torch.cuda.memory_allocated()  # cuBLAS's
    for _ in range(3):
        with LLM("olmoe-1b-7b", load_format="dummy", vram_gb=6, max_model_len=1024) as llm:
            llm.generate([1, 2, 3], PARAMS)
            assert driver_used_bytes() > base + GIB
            assert torch.cuda.host_memory_stats()["allocated_bytes.current"] > 0
        assert driver_used_bytes() <= base + 64 * 2**20
        assert torch.cuda.memory_allocated() <= allocated
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == 0
        assert threading.active_count() == threads


def test_a_budget_that_cannot_hold_the_dense_weights_is_refused_before_allocating() -> None:
    before = driver_used_bytes()
    with pytest.raises(OutOfMemoryError, match="GiB"):
        LLM("mixtral-8x7b", load_format="dummy", vram_gb=2)
    assert driver_used_bytes() <= before + 600 * 2**20  # at most a CUDA context

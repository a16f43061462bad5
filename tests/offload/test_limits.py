"""The limit against cases computed by hand; measured peaks are only looked at."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.hardware import probe
from offload.limits import Peaks, Work, decode_limit_s, prefill_limit_s
from offload.peaks import measure_peaks, row_bytes_per_s

# A token of a 24 GiB plan: 2 GB of experts in host memory, 3 GB in all on the GPU, 6 GFLOP.
WORK = Work(cold_bytes=2e9, hot_bytes=1e9, dense_bytes=1.5e9, kv_bytes=0.5e9, flops=6e9)
GPU = Peaks(
    cpu_read_gbps=90.0, joint_gbps=100.0, pcie_gbps=50.0, gpu_read_gbps=3000.0, gemm_tflops=600.0
)
CPU = Peaks(cpu_read_gbps=25.0, joint_gbps=25.0, pcie_gbps=0.0, gpu_read_gbps=0.0, gemm_tflops=0.1)


def test_a_decode_waits_for_the_slower_memory() -> None:
    assert decode_limit_s(WORK, GPU) == pytest.approx(0.020)  # 2 GB at 100 GB/s
    few_cold = replace(WORK, cold_bytes=1e6)
    assert decode_limit_s(few_cold, GPU) == pytest.approx(0.001)  # 3 GB at 3,000 GB/s


def test_a_prompt_waits_for_a_memory_or_for_the_products() -> None:
    assert prefill_limit_s(WORK, GPU) == pytest.approx(0.020)  # 2 GB at 100 GB/s, by both
    few_cold = replace(WORK, cold_bytes=1e6)
    assert prefill_limit_s(few_cold, GPU) == pytest.approx(0.001)  # 3 GB at 3,000 GB/s
    long = replace(WORK, flops=60e12)
    assert prefill_limit_s(long, GPU) == pytest.approx(0.100)  # 60 TFLOP at 600


def test_without_a_gpu_the_cpu_does_everything() -> None:
    assert not CPU.has_gpu
    assert decode_limit_s(WORK, CPU) == pytest.approx(0.2)  # all 5 GB at 25 GB/s
    assert prefill_limit_s(WORK, CPU) == pytest.approx(0.2)
    long = replace(WORK, flops=60e9)
    assert decode_limit_s(long, CPU) == pytest.approx(0.2)
    assert prefill_limit_s(long, CPU) == pytest.approx(0.6)  # 60 GFLOP at 100 a second


@given(st.floats(0, 1), st.floats(1, 90), st.floats(1, 50))
def test_no_division_of_cold_experts_beats_a_prompts_limit(
    share: float, cpu_gbps: float, pcie_gbps: float
) -> None:
    """Whichever part of them the CPU takes, as fast as the memory lets both be."""
    both = min(1.0, GPU.joint_gbps / (cpu_gbps + pcie_gbps))
    cpu_s = share * WORK.cold_bytes / (cpu_gbps * both * 1e9)
    link_s = (1 - share) * WORK.cold_bytes / (pcie_gbps * both * 1e9)
    assert max(cpu_s, link_s) >= prefill_limit_s(WORK, GPU) * (1 - 1e-9)


def test_nothing_to_do_takes_no_time() -> None:
    idle = Work(cold_bytes=0, hot_bytes=0, dense_bytes=0, kv_bytes=0, flops=0)
    for peaks in (CPU, GPU):
        assert decode_limit_s(idle, peaks) == prefill_limit_s(idle, peaks) == 0


def test_a_machine_without_a_gpu_is_measured() -> None:
    peaks = measure_peaks(probe("cpu"), num_threads=1, dtype="float32")
    assert not peaks.has_gpu
    assert 0.5 < peaks.cpu_read_gbps == peaks.joint_gbps < 1000
    assert 0.001 < peaks.gemm_tflops < 100
    assert peaks.pcie_gbps == 0


def test_a_row_of_torch_reads_at_a_rate_of_this_machine() -> None:
    assert 1e8 < row_bytes_per_s() < 1e13

"""The least time that some work can take where memory, PCIe and arithmetic are this fast: pure."""

from dataclasses import dataclass

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Peaks:
    """What a machine delivers, in 1e9 bytes and 1e12 floating-point operations a second.

    ``joint_gbps``: the most that host memory gives the CPU and PCIe together. Without a GPU the
    fields of GPU and PCIe are 0, and ``gemm_tflops`` is torch's on the CPU.
    """

    cpu_read_gbps: float
    joint_gbps: float
    pcie_gbps: float
    gpu_read_gbps: float
    gemm_tflops: float

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return self.gpu_read_gbps > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Bytes that must be read once, by where they lie, and arithmetic.

    ``cold_bytes`` of experts lie in host memory; hot experts, dense weights and KV on the GPU side.
    """

    cold_bytes: float
    hot_bytes: float
    dense_bytes: float
    kv_bytes: float
    flops: float

    @property
    def gpu_bytes(self) -> float:
        """All that lies on the GPU side."""
        return self.hot_bytes + self.dense_bytes + self.kv_bytes


def decode_limit_s(work: Work, peaks: Peaks) -> float:
    """Least time to decode: every byte is read where it lies, or pulled over PCIe meanwhile."""
    if not peaks.has_gpu:
        return _cpu_read_s(work, peaks)
    return max(_cold_s(work, peaks), _gpu_read_s(work, peaks))


def prefill_limit_s(work: Work, peaks: Peaks) -> float:
    """Least time for a prompt: all weights are read once, and all products computed.

    A cold expert is computed by the CPU or comes over PCIe, as they choose, so both together bound
    it: PCIe alone was beaten by up to 1.6. How fast the CPU multiplies is not counted, so with many
    tokens an expert this is more than can be had. Nor is its part of the products, which are all
    the GPU's here: a hundredth of what that does.
    """
    arithmetic_s = work.flops / (peaks.gemm_tflops * TERA)
    if not peaks.has_gpu:
        return max(_cpu_read_s(work, peaks), arithmetic_s)
    return max(_cold_s(work, peaks), _gpu_read_s(work, peaks), arithmetic_s)


def _cold_s(work: Work, peaks: Peaks) -> float:
    return work.cold_bytes / (peaks.joint_gbps * GIGA)


def _gpu_read_s(work: Work, peaks: Peaks) -> float:
    return work.gpu_bytes / (peaks.gpu_read_gbps * GIGA)


def _cpu_read_s(work: Work, peaks: Peaks) -> float:
    return (work.cold_bytes + work.gpu_bytes) / (peaks.cpu_read_gbps * GIGA)

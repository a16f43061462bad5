"""How a decode step's cold experts are shared between the workers and the device.

Both read host memory at the same time, the device over PCIe, so the step waits for the slower side
only. The cold experts of a layer lie end to end; the first rows of gate and up (columns of w2) are
the workers', the last ones the device's: whole experts, and one in part, since short rows of w2 are
slow to read. Where they meet depends on nothing but how many experts there are. The shares follow
from a machine's rates (:meth:`offload.machine_rates.MachineRates.share_costs`), which were measured
once and are read from a file, or are those of a shipped machine. Never from a measurement of this
start: one that differs from start to start would divide equal steps differently, and they would
round differently.

Shapes: N counts of distinct cold experts, 0, 1, ...; C ways to divide an expert.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareCosts:
    """Bytes a second of either side while the other one reads too, and what comes before them.

    The preset, for who measures a machine, is what steps of Qwen3-30B took on one H200 and a server
    with 16 cores: 14 workers 92 GB/s of experts and the device 42 over PCIe 5 at the same time, of
    110 and 45 of plain reads. ``link_start_s``: a second stream, two
    launches and the link's latency. ``unit``: rows
    that a share is a multiple of, a power of two; of a row of w2 in bf16 64 are the 128 bytes that
    the device reads at once.
    """

    cpu_bytes_per_s: float = 92 * GIGA
    link_bytes_per_s: float = 42 * GIGA
    cpu_start_s: float = 10e-6
    link_start_s: float = 12e-6
    unit: int = 64


def kept_rows(
    largest: int, width: int, expert_bytes: int, costs: ShareCosts, group: int = 1
) -> npt.NDArray[np.int32]:
    """Of n distinct cold experts of a layer, end to end, the rows that stay with the workers.

    int32 ``[largest + 1]``: whole experts and a multiple of the unit and of ``group`` (1: plain
    weights), powers of two; that number which makes the slower side fastest, of equally good ones
    the largest. Tokens of an expert beyond its first cost neither side much and are not counted.
    """
    row_bytes = expert_bytes / width
    cpu_row_s = row_bytes / costs.cpu_bytes_per_s
    part_C = np.array([width, *reversed(range(0, width, max(costs.unit, group)))])
    kept_N = np.zeros(largest + 1, np.int32)
    for count in range(1, largest + 1):
        total = count * width
        kept_C = ((count - 1 - np.arange(count))[:, None] * width + part_C).ravel()
        cpu_C = _seconds(kept_C, cpu_row_s, costs.cpu_start_s)
        link_C = _seconds(total - kept_C, row_bytes / costs.link_bytes_per_s, costs.link_start_s)
        kept_N[count] = kept_C[np.maximum(cpu_C, link_C).argmin()]
    return kept_N


def _seconds(rows: npt.NDArray[np.int64], each_s: float, start_s: float) -> npt.NDArray[np.float64]:
    """Of so many rows on one side; none cost nothing."""
    return rows * each_s + start_s * (rows > 0)

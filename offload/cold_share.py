"""How a decode step's cold experts are shared: the workers read some, the device pulls the others.

Both read host memory at the same time, the device over PCIe, so the step waits for the slower side
only. The shares follow from figures that do not come from a measurement of this start: one that
differs from start to start would divide equal steps differently, and they would round differently.

Shapes: N counts of distinct cold experts, 0, 1, ...
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GIGA = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareCosts:
    """Bytes a second of either side while the other one reads too, and what comes before them.

    The preset is a usual server: 100 GB/s to 14 workers and 50 GB/s over PCIe 5 (one H200 with 16
    cores: 80 to 150, and 51 to 55). ``link_start_s``: two launches and the link's latency.
    """

    cpu_bytes_per_s: float = 100 * GIGA
    link_bytes_per_s: float = 50 * GIGA
    cpu_start_s: float = 10e-6
    link_start_s: float = 15e-6


def pull_counts(largest: int, expert_bytes: int, costs: ShareCosts) -> npt.NDArray[np.int32]:
    """Of n distinct cold experts of a layer, how many the device pulls; int32 ``[largest + 1]``.

    That number makes the slower side fastest; of equally good ones the least. Tokens of an expert
    beyond its first cost neither side much and are not counted.
    """
    cpu_s = _seconds(largest, expert_bytes / costs.cpu_bytes_per_s, costs.cpu_start_s)
    link_s = _seconds(largest, expert_bytes / costs.link_bytes_per_s, costs.link_start_s)
    slower_s = [np.maximum(link_s[: n + 1], cpu_s[n::-1]) for n in range(largest + 1)]
    return np.array([np.argmin(seconds) for seconds in slower_s], dtype=np.int32)


def _seconds(largest: int, each_s: float, start_s: float) -> npt.NDArray[np.float64]:
    """Of 0 to ``largest`` experts on one side; none cost nothing."""
    count = np.arange(largest + 1)
    return count * each_s + start_s * (count > 0)

"""What a plan needs to know of a machine's speed: rates, fixed costs, and times of CPU experts."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cpu_kernels.times import TimeTable
from cpu_kernels.weight_kind import BITS
from offload.calibration import Quantity
from offload.cold_share import ShareCosts
from offload.limits import GIGA, TERA, Peaks

# Kinds that are not measured take as long a byte as one that is: codes of as many bits, and float32
# as bf16.
KERNELS = {"int8": "w8g128", "int4": "w4g128"}
# So does bf12, where it was not measured, with so few tokens; with more of them it takes as long as
# the same numbers in bf16 do (14 workers, 2048 x 768: 0.070 and 0.092 ms with one token, 0.102 and
# 0.104 with 16, 0.305 and 0.307 with 128).
FEW_TOKENS = 4
# Of plain reads over the link beside the workers, what experts' kernels get: 42.5 GB/s of 45 in
# bf16, 39 to 41 packed (timelines of Qwen3-30B's decode steps).
PULL_PART = 0.92
# Rows of a decode step's experts beside those of experts that were measured, a few to a call: by
# this part the speeds of Qwen3-30B and Mixtral add up on the H200 machine.
STEP_PART = 0.94
# Of the fastest of many divisions, which is the fastest by chance too: on two hosts decode steps of
# 18 kinds took 4 and 11 % longer than by its rates.
SHARED_PART = 0.95
# What a layer's cold experts take beside their bytes: workers that read one, two and more w4g128
# experts took 10 us and 26 for each. A calibration leaves it out of the rates that it finds.
START_S = 1e-5
# What no machine exceeds, by a factor of 100 or more: GB/s and TFLOP/s of a rate, seconds of a
# time. A damaged figure beyond them would make predictions that are 0, infinite or a division by 0.
RATE_RANGE, TIME_RANGE = (1e-6, 1e6), (1e-10, 1e3)
MOST_COUNT = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertTimes:
    """Times of experts of one size, each of ``expert_bytes``. ValueError if implausible."""

    expert_bytes: int
    table: TimeTable

    def __post_init__(self) -> None:
        table = self.table
        _check_counts(self.expert_bytes, table.hidden, table.width, *table.tokens)
        _check_within(TIME_RANGE, *table.rows_s, *(table.columns_s or ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRates:
    """What workers and link read of experts of one kernel and size that they share, GB/s.

    ``link_gbps`` 0: sharing gains nothing. ValueError if implausible.
    """

    kernel: str
    expert_bytes: int
    cpu_gbps: float
    link_gbps: float

    def __post_init__(self) -> None:
        _check_counts(self.expert_bytes)
        _check_within(RATE_RANGE, self.cpu_gbps, *_measured(self.link_gbps))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRates:
    """One machine. A rate is 1e9 bytes a second, times are seconds; 0 is what was not measured.

    ``pull_gbps``: kernels reading pinned memory alone; ``beside_*``: they and the workers at the
    same time. ``call_s``: one more call of torch on the CPU, ``launch_s`` one more small kernel in
    a CUDA graph, ``python_launch_s`` one that Python starts. ``cpu_tflops``: torch's float32
    products on the CPU, 1e12 operations a second; ``row_gbps``: what it reads of the weights where
    one row is multiplied, which may be less than half of what memory gives.
    ``hand_over_s``: workers that have nothing to do, in one layer of a decode step.
    ``disk_gbps``: of the disk that has the user's cache. ``times`` of every measured kernel, as
    ``bf16/f32``, and size; ``shared`` of some.
    """

    num_threads: int
    peaks: Peaks
    times: tuple[ExpertTimes, ...]
    call_s: float
    cpu_tflops: float
    row_gbps: float = 0.0
    launch_s: float = 0.0
    python_launch_s: float = 0.0
    pull_gbps: float = 0.0
    beside_cpu_gbps: float = 0.0
    beside_pull_gbps: float = 0.0
    hand_over_s: float = 0.0
    disk_gbps: float = 0.0
    shared: tuple[SharedRates, ...] = ()

    def __post_init__(self) -> None:
        _check_counts(self.num_threads)
        peaks = self.peaks
        rates = [peaks.cpu_read_gbps, peaks.joint_gbps, peaks.gemm_tflops, self.cpu_tflops]
        rates += _measured(peaks.pcie_gbps, peaks.gpu_read_gbps, self.pull_gbps, self.disk_gbps)
        rates += _measured(self.beside_cpu_gbps, self.beside_pull_gbps, self.row_gbps)
        _check_within(RATE_RANGE, *rates)
        launches = self.launch_s, self.python_launch_s
        _check_within(TIME_RANGE, self.call_s, *_measured(*launches, self.hand_over_s))
        if self.has_gpu and not (self.peaks.pcie_gbps and self.pull_gbps and all(launches)):
            raise ValueError("a GPU must have a link and launches")

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return self.peaks.has_gpu

    def peaks_for(self, *, on_gpu: bool) -> Peaks:
        """The peaks of this machine, or of its CPU alone."""
        if on_gpu or not self.has_gpu:
            return self.peaks
        read = self.peaks.cpu_read_gbps
        return Peaks(
            cpu_read_gbps=read,
            joint_gbps=read,
            pcie_gbps=0.0,
            gpu_read_gbps=0.0,
            gemm_tflops=self.cpu_tflops,
        )

    def limits_for(self, *, on_gpu: bool) -> Peaks:
        """The same for limits: no products are faster, on the CPU neither torch's nor experts'."""
        return self.at_most(self.peaks_for(on_gpu=on_gpu))

    def at_most(self, peaks: Peaks) -> Peaks:
        """``peaks`` with the CPU's fastest products where there is no GPU: torch's are float32,
        and experts' kernels multiply in bfloat16 or int8 where the CPU can."""
        if peaks.has_gpu:
            return peaks
        fastest = max((_tflops(times.table) for times in self.times), default=0.0)
        return replace(peaks, gemm_tflops=max(peaks.gemm_tflops, fastest))

    def beside_s(self, own_s: float, num_bytes: float) -> float:
        """What the workers take while the GPU pulls too, of what takes ``own_s`` alone.

        Only those who read as fast as memory delivers then are slower for it.
        """
        if not self.beside_cpu_gbps:
            return own_s
        return max(own_s, num_bytes / (self.beside_cpu_gbps * GIGA))

    def share_costs(self, codes: str, activations: str, expert_bytes: int) -> ShareCosts:
        """By what decode steps share cold experts of such weights between workers and GPU.

        As the two were measured while they shared experts of that kernel, or of bf16 if it is
        memory that the kernel waits for; else as they read side by side, or alone. Nothing is
        measured here: equal rates, which a calibration's file keeps, divide equal steps equally at
        every start.
        """
        alone = expert_bytes / (
            STEP_PART * self.expert_s(codes, activations, expert_bytes)(1, False)
        )
        if own := self._shared(codes, activations):
            return self._of_a_model(_shared_costs(own, expert_bytes))
        if dense := self._shared("bf16", "f32"):
            costs = self._of_a_model(_shared_costs(dense, expert_bytes))
            return replace(costs, cpu_bytes_per_s=min(costs.cpu_bytes_per_s, alone))
        memory = (self.beside_cpu_gbps or self.peaks.cpu_read_gbps) * GIGA
        link = (self.beside_pull_gbps or self.pull_gbps) * GIGA
        return ShareCosts(cpu_bytes_per_s=min(memory, alone), link_bytes_per_s=PULL_PART * link)

    def expert_s(
        self, codes: str, activations: str, expert_bytes: int
    ) -> "Callable[[int, bool], float]":
        """Seconds of one expert by (tokens, by columns), for weights of ``codes``.

        Straight between the two sizes that were measured, in proportion beyond them. ValueError
        where no kernel of such weights was measured.
        """
        curves = self._curves(codes, activations)
        if not curves:
            raise ValueError(f"no kernel for {codes} weights was measured on this machine")

        is_own = curves[0].table.kernel.startswith(f"{codes}/")

        def seconds(num_tokens: int, by_columns: bool = False) -> float:
            points = [
                (c.expert_bytes, c.table.time(num_tokens, by_columns=by_columns)) for c in curves
            ]
            if codes == "bf12" and not is_own and num_tokens > FEW_TOKENS:
                return _at(points, expert_bytes * BITS["bf16"] // BITS["bf12"])
            return _at(points, expert_bytes)

        return seconds

    def switch_over(self, codes: str, activations: str, expert_bytes: int) -> int | None:
        """From how many tokens on columns are faster, of the nearest measured size."""
        curves = [c for c in self._curves(codes, activations) if c.table.columns_s is not None]
        if not curves:
            return None
        nearest = min(curves, key=lambda c: abs(math.log(c.expert_bytes / expert_bytes)))
        return nearest.table.switch_over()

    def _of_a_model(self, costs: ShareCosts) -> ShareCosts:
        """What a model's steps get of what the measured layers got.

        No more than plain reads of both sides gave: beyond is what the caches gave, and a model's
        experts are many times those that are measured.
        """
        left = self.peaks.joint_gbps * GIGA - costs.link_bytes_per_s
        cpu = min(costs.cpu_bytes_per_s, max(left, GIGA))
        return replace(
            costs,
            cpu_bytes_per_s=SHARED_PART * cpu,
            link_bytes_per_s=SHARED_PART * costs.link_bytes_per_s,
        )

    def _shared(self, codes: str, activations: str) -> list[SharedRates]:
        kernel = f"{KERNELS.get(codes, codes)}/{activations}"
        found = [one for one in self.shared if one.kernel == kernel]
        return sorted(found, key=lambda one: one.expert_bytes)

    def _curves(self, codes: str, activations: str) -> list[ExpertTimes]:
        for kind in [KERNELS[codes]] if codes in KERNELS else [codes, "bf16"]:
            kernel = f"{kind}/{activations}"
            found = [times for times in self.times if times.table.kernel == kernel]
            if found:
                return sorted(found, key=lambda times: times.expert_bytes)
        return []


def _measured(*figures: float) -> list[float]:
    """Those that are not 0."""
    return [figure for figure in figures if figure != 0]


def _check_counts(*counts: int) -> None:
    for count in counts:
        if type(count) is not int or not 1 <= count <= MOST_COUNT:
            raise ValueError(f"rates must be of whole numbers from 1 on, not of {count!r}")


def _check_within(bounds: tuple[float, float], *figures: float) -> None:
    least, most = bounds
    for figure in figures:
        if not (isinstance(figure, float | int) and least <= figure <= most):
            bounds_text = f"from {least:g} to {most:g}"
            raise ValueError(f"rates and times must be {bounds_text}, and one is {figure!r}")


def to_json(rates: MachineRates) -> dict[str, Any]:
    """As JSON types."""
    return asdict(rates)


def from_json(found: Any) -> MachineRates:
    """The inverse; ValueError for what is no such record."""
    try:
        times = tuple(
            ExpertTimes(expert_bytes=one["expert_bytes"], table=_table(one["table"]))
            for one in found["times"]
        )
        shared = tuple(SharedRates(**one) for one in found.get("shared", ()))
        peaks = Peaks(**found["peaks"])
        return MachineRates(**{**found, "peaks": peaks, "times": times, "shared": shared})
    except (TypeError, KeyError) as error:
        raise ValueError("this is no record of a machine's rates") from error


RATES = Quantity("machine-rates", to_json, from_json)


def _tflops(table: TimeTable) -> float:
    """The fastest products of an expert, 1e12 operations a second."""
    flops = 6 * table.hidden * table.width
    ways = [way_s for way_s in (table.rows_s, table.columns_s) if way_s is not None]
    return max(
        flops * tokens / seconds / TERA
        for way_s in ways
        for tokens, seconds in zip(table.tokens, way_s, strict=True)
    )


def _table(found: dict[str, Any]) -> TimeTable:
    tokens, rows_s = tuple(found["tokens"]), tuple(found["rows_s"])
    columns_s = found["columns_s"] and tuple(found["columns_s"])
    return TimeTable(**{**found, "tokens": tokens, "rows_s": rows_s, "columns_s": columns_s})


def _shared_costs(ascending: list[SharedRates], expert_bytes: int) -> ShareCosts:
    """On the line between two sizes; as the nearest one beyond them."""
    sizes = [one.expert_bytes for one in ascending]
    cpu, link = (
        float(np.interp(expert_bytes, sizes, [getattr(one, side) for one in ascending])) * GIGA
        for side in ("cpu_gbps", "link_gbps")
    )
    return ShareCosts(
        cpu_bytes_per_s=cpu,
        link_bytes_per_s=max(link, 1.0),
        cpu_start_s=START_S,
        link_start_s=START_S,
    )


def _at(points: list[tuple[int, float]], x: int) -> float:
    """On the line between two of the points, which ascend; in proportion beyond them."""
    (first_x, first), (last_x, last) = points[0], points[-1]
    if x <= first_x:
        return first * x / first_x
    if x >= last_x:
        return last * x / last_x
    return first + (last - first) * (x - first_x) / (last_x - first_x)

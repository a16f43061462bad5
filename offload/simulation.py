"""Policies side by side on the same routes, within the same memory: hits, bytes, speeds.

Shapes: T tokens, S steps, M layers with experts, E experts, K top-k, C choices of a layer in one
step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from offload.adaptive import COPY_SHARE
from offload.limits import GIGA, Peaks
from offload.plan import Footprint
from offload.planner import place
from offload.policies import Adaptive, Ids, Lru, Mask, Oracle, Played, Policy, Static, play
from offload.popularity import Popularity

# seconds of the mean step of what was played, where (or where not) all experts are resident
StepSeconds = Callable[[Played, bool], float]
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One policy within ``num_slots`` experts of GPU memory.

    ``hit_rate``: share of reads that met a resident expert. Bytes are of a token; ``moved_bytes``
    are those of experts copied in either direction. ``predicted_tokens_per_s`` is what a plan would
    say, None where that is not known; ``limit_tokens_per_s`` is what bandwidths allow: nothing
    waits for anything else.
    """

    policy: str
    num_slots: int
    hit_rate: float
    cold_bytes: float
    moved_bytes: float
    predicted_tokens_per_s: float | None
    limit_tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Routes to play policies on; ``trained_ME`` are the counts that placements are made from.

    Each step is a token of each of ``batch`` requests, and ``step_s`` predicts how long it takes;
    None: that is not known. ``peaks`` are for the limit. ``copy_share`` of a step's time is for the
    adaptive policy's copies.
    """

    steps_SMC: Ids
    trained_ME: npt.NDArray[np.int64]
    batch: int
    footprint: Footprint
    peaks: Peaks
    step_s: StepSeconds | None = None
    copy_share: float = COPY_SHARE

    def verdicts(self, num_slots: int, on_progress: Progress | None = None) -> list[Verdict]:
        """Every policy that can be played within ``num_slots``; steps are told by policy."""
        found = []
        for name, make in self._policies(num_slots).items():
            on_step = None
            if on_progress is not None:
                on_step = partial(on_progress, f"{name}, {num_slots:,} experts")
                on_step(0, len(self.steps_SMC))  # the oracle looks ahead for a while
            played = play(make(), self.steps_SMC, on_step)
            found.append(self._judge(name, num_slots, played))
        return found

    def _policies(self, num_slots: int) -> dict[str, Callable[[], Policy]]:
        rows, experts = self.trained_ME.shape
        num_slots = min(num_slots, rows * experts)
        evenly_M = num_slots // rows + (np.arange(rows) < num_slots % rows)
        own_ME = counts(self.steps_SMC, experts)
        nothing_ME = np.zeros_like(self.trained_ME)
        makers: dict[str, Callable[[], Policy]] = {
            "no profile": lambda: Static(residents(nothing_ME, num_slots)),
            "static": lambda: Static(residents(self.trained_ME, num_slots)),
            "best static": lambda: Static(residents(own_ME, num_slots)),
            "lru": lambda: Lru(evenly_M, self.trained_ME),
        }
        if num_slots > rows:  # a spare slot a layer
            start_ME = residents(self.trained_ME, num_slots - rows)
            makers["adaptive"] = lambda: Adaptive(
                start_ME, self.footprint.expert_bytes, self.copy_share
            )
        return makers | {"oracle": lambda: Oracle(self.steps_SMC, experts, num_slots)}

    def _judge(self, name: str, num_slots: int, played: Played) -> Verdict:
        reads, hits, loaded, moved = (int(count.sum()) for count in played)
        num_tokens = len(self.steps_SMC) * self.batch
        size = self.footprint.expert_bytes
        return Verdict(
            policy=name,
            num_slots=num_slots,
            hit_rate=hits / reads,
            cold_bytes=(reads - hits) * size / num_tokens,
            moved_bytes=(loaded + moved) * size / num_tokens,
            predicted_tokens_per_s=self._predicted(played, num_slots),
            limit_tokens_per_s=num_tokens / self._least_s(played),
        )

    def _predicted(self, played: Played, num_slots: int) -> float | None:
        if self.step_s is None:
            return None
        return self.batch / self.step_s(played, num_slots >= self.trained_ME.size)

    def _least_s(self, played: Played) -> float:
        """Least time: host memory, PCIe and the GPU each do their part of a step at once.

        What misses is read in place by CPU and PCIe together, unless it is brought over whole.
        """
        of_layers = played.reads_SM, played.hits_SM, played.loaded_SM
        size = self.footprint.expert_bytes / GIGA
        reads_S, hits_S, loaded_S = (count_SM.sum(axis=1) * size for count_SM in of_layers)
        moved_S, peaks = played.moved_S * size, self.peaks
        dense = self.footprint.dense_read_bytes / GIGA
        host_S = (reads_S - hits_S + moved_S) / peaks.joint_gbps
        link_S = (loaded_S + moved_S / 2) / peaks.pcie_gbps  # swaps: half of it each way
        gpu_S = (dense + hits_S + loaded_S) / peaks.gpu_read_gbps
        return float(np.maximum(np.maximum(host_S, link_S), gpu_S).sum())


def steps_of(experts_TMK: Ids, batch: int) -> Ids:
    """Tokens as the steps of ``batch`` requests, each an equal run of them; a rest is left out."""
    num_steps = len(experts_TMK) // batch
    _, rows, top_k = experts_TMK.shape
    runs_BSMK = experts_TMK[: num_steps * batch].reshape(batch, num_steps, rows, top_k)
    return runs_BSMK.transpose(1, 2, 0, 3).reshape(num_steps, rows, batch * top_k)


def counts(ids_SMC: Ids, num_experts: int) -> npt.NDArray[np.int64]:
    """How often each expert was chosen, ``[M, E]``."""
    rows = ids_SMC.shape[1]
    flat = (ids_SMC.astype(np.int64) + np.arange(rows)[:, None] * num_experts).ravel()
    return np.bincount(flat, minlength=rows * num_experts).reshape(rows, num_experts)


def residents(counts_ME: npt.NDArray[np.int64], num_resident: int) -> Mask:
    """The planner's placement of the most used experts, as a mask."""
    is_resident_ME = np.zeros(counts_ME.shape, bool)
    placement = place(Popularity(counts_ME), range(len(counts_ME)), num_resident)
    for row, experts in enumerate(placement.resident):
        is_resident_ME[row, sorted(experts)] = True
    return is_resident_ME

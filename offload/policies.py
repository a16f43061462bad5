"""Ways to decide which experts are in GPU memory, played on recorded or drawn routes: pure.

A step's reads are its distinct experts, layer by layer: however many tokens share one, its weights
are read once. A read is a hit where the expert was resident when the step began.

Shapes: S steps, M layers with experts, E experts, C choices of one layer in a step.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from offload.adaptive import COPY_SHARE, AdaptivePolicy
from offload.simulated_swaps import SimulatedSwaps

Ids = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
OnStep = Callable[[int, int], None]  # done, total

TOLD = 64  # steps between two words of progress


class Outcome(NamedTuple):
    """Experts of one step: by layer those that are read, of them resident ones, and those that are
    brought to the device to be computed there; of all layers those that are copied beside the step,
    in either direction."""

    reads_M: Counts
    hits_M: Counts
    loaded_M: Counts
    moved: int


class Played(NamedTuple):
    """The outcomes of all steps."""

    reads_SM: Counts
    hits_SM: Counts
    loaded_SM: Counts
    moved_S: Counts


class Policy(Protocol):
    """Plays one step after the other."""

    def step(self, ids_MC: Ids) -> Outcome:
        """The next step chooses ``ids_MC``; an expert may be in a row more than once."""
        ...


class Static:
    """Experts stay where they are; the CPU computes the others."""

    def __init__(self, is_resident_ME: Mask) -> None:
        self._is_resident_ME = is_resident_ME

    def step(self, ids_MC: Ids) -> Outcome:
        is_used_ME = used(ids_MC, self._is_resident_ME.shape[1])
        return _in_place(is_used_ME, self._is_resident_ME)


class Lru:
    """Every miss is brought to the device, where that leaves which was not used for longest.

    ``slots_M`` of each layer. It begins with the most popular; of experts that one step uses the
    lower ids stay.
    """

    def __init__(self, slots_M: npt.NDArray[np.int64], popularity_ME: Ids) -> None:
        rank_ME = np.argsort(np.argsort(-popularity_ME, axis=1, kind="stable"), axis=1)
        self._last_ME = -1 - rank_ME  # the step of last use; before the first, by popularity
        self._slots_M1 = slots_M[:, None]
        self._is_resident_ME: Mask = rank_ME < self._slots_M1
        self._now = 0

    def step(self, ids_MC: Ids) -> Outcome:
        is_used_ME = used(ids_MC, self._last_ME.shape[1])
        reads_M = _numbers(is_used_ME)
        hits_M = _numbers(is_used_ME & self._is_resident_ME)
        self._last_ME[is_used_ME] = self._now
        self._now += 1
        order_ME = np.argsort(-self._last_ME, axis=1, kind="stable")
        ranks = np.broadcast_to(np.arange(order_ME.shape[1]), order_ME.shape)
        np.put_along_axis(self._is_resident_ME, order_ME, ranks < self._slots_M1, axis=1)
        return Outcome(reads_M, hits_M, reads_M - hits_M, 0)


class Adaptive:
    """What the engine does with ``--placement adaptive``: its own counts, budget and choice."""

    def __init__(
        self, is_resident_ME: Mask, expert_bytes: int, copy_share: float = COPY_SHARE
    ) -> None:
        """Besides the residents there is a slot more in each layer with experts on both sides."""
        num_layers, num_experts = is_resident_ME.shape
        self._policy = AdaptivePolicy(num_layers, num_experts, expert_bytes, copy_share=copy_share)
        self._swaps = SimulatedSwaps(is_resident_ME)
        self._layers = range(len(is_resident_ME))

    def step(self, ids_MC: Ids) -> Outcome:
        num_leaving = self._swaps.advance()
        is_resident_ME = self._swaps.is_resident_ME
        swaps = self._policy.swaps(lambda: is_resident_ME, self._swaps.idle_layers)
        self._swaps.start(swaps)
        is_used_ME = used(ids_MC, is_resident_ME.shape[1])
        self._policy.count(self._layers, ids_MC, is_resident_ME)
        return _in_place(is_used_ME, is_resident_ME, len(swaps) + num_leaving)


class Oracle:
    """Knows all steps and keeps what is used next: no policy of as many slots does better.

    Slots belong to no layer. It begins with what is used first, and keeps an expert only from a
    step that reads it (Belady's rule, where a miss need not be kept). Whatever another policy does,
    its hits less the copies that no read of that step asked for are at most these hits: a copy made
    ahead could wait for its expert's next read, which then is a miss.
    """

    def __init__(self, steps_SMC: Ids, num_experts: int, num_slots: int) -> None:
        num_steps, num_layers, _ = steps_SMC.shape
        self._never = num_steps
        self._num_slots = num_slots
        self._shape = num_layers, num_experts
        self._next_by_step, self._next_F = self._next_uses(steps_SMC)
        self._now = 0
        self._is_resident_F = self._nearest(np.ones(num_layers * num_experts, bool))

    def step(self, ids_MC: Ids) -> Outcome:
        is_used_ME = used(ids_MC, self._shape[1])
        is_used_F = is_used_ME.ravel()
        outcome = _in_place(is_used_ME, self._is_resident_F.reshape(self._shape))
        self._next_F[is_used_F] = self._next_by_step[self._now]
        self._now += 1
        self._is_resident_F = self._nearest(is_used_F | self._is_resident_F)
        return outcome

    def _next_uses(
        self, steps_SMC: Ids
    ) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.int32]]:
        """By step, when each expert that it uses is used next; and each expert's first use.

        F: all experts of all layers in one row.
        """
        next_F = np.full(self._shape[0] * self._shape[1], self._never, np.int32)
        found = []
        for step in range(len(steps_SMC) - 1, -1, -1):
            is_used_F = used(steps_SMC[step], self._shape[1]).ravel()
            found.append(next_F[is_used_F])
            next_F[is_used_F] = step
        return found[::-1], next_F

    def _nearest(self, may_stay_F: Mask) -> Mask:
        """Of those that may stay, the ones that are used soonest."""
        (may_stay,) = np.nonzero(may_stay_F)
        if len(may_stay) > self._num_slots:
            next_uses = self._next_F[may_stay]
            may_stay = may_stay[np.argsort(next_uses, kind="stable")[: self._num_slots]]
        is_resident_F = np.zeros(len(may_stay_F), bool)
        is_resident_F[may_stay] = True
        return is_resident_F


def used(ids_MC: Ids, num_experts: int) -> Mask:
    """Which experts a step reads, ``[M, E]``."""
    is_used_ME = np.zeros((len(ids_MC), num_experts), bool)
    np.put_along_axis(is_used_ME, ids_MC.astype(np.intp), True, axis=1)
    return is_used_ME


def play(policy: Policy, steps_SMC: Ids, on_step: OnStep | None = None) -> Played:
    """All of at least one step, one after the other; ``on_step`` is told of some, and the last."""
    outcomes = []
    for number, ids_MC in enumerate(steps_SMC, start=1):
        outcomes.append(policy.step(ids_MC))
        if on_step is not None and (number % TOLD == 0 or number == len(steps_SMC)):
            on_step(number, len(steps_SMC))
    return Played(*(np.array(column, np.int64) for column in zip(*outcomes, strict=True)))


def _in_place(is_used_ME: Mask, is_resident_ME: Mask, moved: int = 0) -> Outcome:
    """Misses are read where they lie."""
    reads_M, hits_M = _numbers(is_used_ME), _numbers(is_used_ME & is_resident_ME)
    return Outcome(reads_M, hits_M, np.zeros_like(reads_M), moved)


def _numbers(mask_ME: Mask) -> Counts:
    number_M: Counts = np.count_nonzero(mask_ME, axis=1)
    return number_M

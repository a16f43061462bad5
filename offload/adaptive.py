"""Which experts should change places while a model decodes: pure, from what steps have chosen.

Use is counted with decay: an expert's heat is the number of tokens that chose it, those of a step
ago times DECAY, and so on. A cold expert takes a resident one's slot where its heat is larger by a
margin, the largest difference first, as far as a budget of bytes goes. The budget is a share of the
bytes that steps read from host memory, not of measured time: equal requests move equal experts.

Shapes: L layers, E experts, C choices of one layer in a step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

DECAY = 0.99  # of a step's weight at the next: 100 steps count, a paragraph of text
# Standard errors by which a newcomer has to lead. A heat's variance is half of it, if choices are
# independent; of thousands of pairs, a few are 3 standard errors apart by chance alone.
MARGIN = 4.0
COPY_SHARE = 0.1  # of a step's time, for copies of experts
# Copies go over the link, which is a third of what reads host memory in a step (see cold_share).
LINK_SHARE = 1 / 3


@dataclass(frozen=True, slots=True)
class Swap:
    """Two experts of a layer that change places: one comes to the device, one leaves it."""

    layer: int
    comes: int
    leaves: int


class Heat:
    """Decayed counts of use, ``heat_LE``; layers without experts stay at 0."""

    def __init__(self, num_layers: int, num_experts: int, decay: float = DECAY) -> None:
        self.heat_LE = np.zeros((num_layers, num_experts))
        self._decay = decay

    def count(self, layers: Sequence[int], ids_LC: npt.NDArray[np.integer]) -> None:
        """Add one step's choices, row n those of ``layers[n]``."""
        self.heat_LE *= self._decay
        np.add.at(self.heat_LE, (np.asarray(layers)[:, None], ids_LC), 1.0)


class CopyBudget:
    """Bytes that may be copied now: earned by steps, spent by swaps, two copies each.

    What is not spent is kept up to the price of one swap, or of a step's earnings if that is more.
    """

    def __init__(self, expert_bytes: int, share: float = COPY_SHARE * LINK_SHARE) -> None:
        self._swap_bytes, self._expert_bytes, self._share = 2 * expert_bytes, expert_bytes, share
        self._bytes = 0.0

    @property
    def num_swaps(self) -> int:
        """How many can be paid for."""
        return int(self._bytes // self._swap_bytes)

    def earn(self, num_cold: int) -> None:
        """A step has read so many experts from host memory."""
        earned = self._share * num_cold * self._expert_bytes
        self._bytes = min(self._bytes + earned, max(self._swap_bytes, earned))

    def spend(self, num_swaps: int) -> None:
        assert num_swaps <= self.num_swaps
        self._bytes -= num_swaps * self._swap_bytes


def choose_swaps(
    heat_LE: npt.NDArray[np.float64],
    is_resident_LE: npt.NDArray[np.bool_],
    layers: Iterable[int],
    most: int,
    margin: float = MARGIN,
) -> list[Swap]:
    """At most ``most`` swaps, at most one in each of ``layers``, the most useful first.

    A newcomer leads by more than ``margin`` standard errors of the difference. Of equally hot
    experts the lower id counts, of equal gains the lower layer. ``layers`` have experts on both
    sides.
    """
    rows = sorted(layers)
    if not rows or most <= 0:
        return []
    heat, is_resident = heat_LE[rows], is_resident_LE[rows]
    comes = np.where(is_resident, -np.inf, heat).argmax(axis=1)
    leaves = np.where(is_resident, heat, np.inf).argmin(axis=1)
    row = np.arange(len(rows))
    hotter, colder = heat[row, comes], heat[row, leaves]
    gain = hotter - colder
    is_sure = gain > margin * np.sqrt((hotter + colder) / 2)
    order = np.argsort(-np.where(is_sure, gain, -np.inf), kind="stable")[:most]
    return [Swap(rows[n], int(comes[n]), int(leaves[n])) for n in order.tolist() if is_sure[n]]


# (heat_LE, is_resident_LE, layers, most) to swaps; see choose_swaps
Chooser = Callable[[npt.NDArray[np.float64], npt.NDArray[np.bool_], list[int], int], list[Swap]]


class AdaptivePolicy:
    """Counts, earns and decides; who moves experts, and whether any are moved, it does not know."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        expert_bytes: int,
        *,
        choose: Chooser = choose_swaps,
        copy_share: float = COPY_SHARE,
    ) -> None:
        """``copy_share``: the part of a step's time for copies."""
        self._choose = choose
        self._heat = Heat(num_layers, num_experts)
        self._budget = CopyBudget(expert_bytes, copy_share * LINK_SHARE)

    def count(
        self,
        layers: Sequence[int],
        ids_LC: npt.NDArray[np.integer],
        is_resident_LE: npt.NDArray[np.bool_],
    ) -> None:
        """A step has chosen ``ids_LC``, row n in ``layers[n]``, while these were resident."""
        self._heat.count(layers, ids_LC)
        is_used_LE = np.zeros(self._heat.heat_LE.shape, dtype=bool)
        is_used_LE[np.asarray(layers)[:, None], ids_LC] = True
        self._budget.earn(int((is_used_LE & ~is_resident_LE).sum()))

    def swaps(
        self, is_resident_LE: Callable[[], npt.NDArray[np.bool_]], idle_layers: list[int]
    ) -> list[Swap]:
        """What to swap now in ``idle_layers``; it is paid for.

        ``is_resident_LE`` is asked for only where a swap can be paid.
        """
        most = self._budget.num_swaps
        if not most:
            return []
        swaps = self._choose(self._heat.heat_LE, is_resident_LE(), idle_layers, most)
        self._budget.spend(len(swaps))
        return swaps

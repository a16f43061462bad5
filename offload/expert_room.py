"""How many experts fit where, when those of some layers are larger than others: pure.

Room is given in one order, the plan's: the most useful first. So more room never holds fewer.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain


class ExpertRoom:
    """Of experts with ``sizes`` bytes, in the order in which they get room."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = [0, *accumulate(sizes)]

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self._ends[-1]

    def bytes_of(self, count: int) -> int:
        """Of the first ``count``."""
        return self._ends[count]

    def fitting(self, room: int) -> int:
        """The most of the first ones that ``room`` bytes hold."""
        return max(0, bisect_right(self._ends, room) - 1)


def in_turn(layer_bytes: Sequence[int], count: int) -> list[int]:
    """Sizes of ``count`` slots or experts taken from the layers in turn."""
    rounds = -(-count // len(layer_bytes))
    return list(chain.from_iterable([layer_bytes] * rounds))[:count]

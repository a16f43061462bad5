"""Inputs that are much larger than the others, and the columns of weights that read them.

A column for such an input is kept in 8 bits within a matrix of 4: it is two columns, one with the
high and one with the low half of its codes, in groups of their own, and its input is read by both.
Kernels know nothing of it: matrices are wider, and inputs come in another order, some of them
twice. Columns are: those of other inputs, the high halves, the low halves, each padded to whole
groups.
"""

from collections.abc import Sequence


def padded_size(size: int, count: int, group: int) -> int:
    """Columns for ``size`` inputs, of which ``count`` are outliers; ``size`` if none is."""
    if not count:
        return size
    return whole_groups(size - count, group) + 2 * whole_groups(count, group)


def places(size: int, outliers: Sequence[int], group: int) -> list[int]:
    """The input that each column reads; -1 for padding, whose weights are 0."""
    chosen = set(outliers)
    others = [i for i in range(size) if i not in chosen]
    runs = (others, outliers, outliers) if chosen else (others,)
    found: list[int] = []
    for run in runs:
        found += run
        if chosen:
            found += [-1] * (whole_groups(len(run), group) - len(run))
    return found


def whole_groups(size: int, group: int) -> int:
    """``size`` columns padded to groups."""
    return -(-size // group) * group

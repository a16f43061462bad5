"""Which of a layer's cold experts the CPU computes while the link brings the others: pure.

Both work at the same time, so a layer takes as long as the slower of them. The CPU takes the
experts with the fewest tokens: what it costs grows with them, while a copy costs the same whatever
the tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEAST_TOKENS = 33  # of a step that goes this way; the kernels for decoding take up to 32

# What passes in a layer besides its experts, while the link goes on: attention, norms, router,
# launches. Measured as about a millisecond for 512 tokens; only the next layer's copies depend on
# it.
GAP_S = 1e-3


def cpu_share(
    counts: Sequence[int],
    expert_s: Callable[[int], float],
    *,
    copy_s: float,
    queued_s: float = 0.0,
    start_s: float = 0.0,
) -> list[int]:
    """Indices of ``counts`` (tokens of each expert) that the CPU computes, ascending.

    Minimises the greater of the CPU's time, ``start_s`` and ``expert_s(tokens)`` of each, and the
    link's, ``queued_s`` and ``copy_s`` for each of the others. ``queued_s`` is what the link has
    to do anyway: a CPU that ends before it holds nobody up. Experts without tokens are nobody's.
    """
    order = sorted((e for e, count in enumerate(counts) if count > 0), key=lambda e: counts[e])
    best_s, best = queued_s + len(order) * copy_s, 0
    cpu_s = start_s
    for taken, e in enumerate(order, start=1):
        cpu_s += expert_s(counts[e])
        end_s = max(cpu_s, queued_s + (len(order) - taken) * copy_s)
        if end_s < best_s:
            best_s, best = end_s, taken
        if cpu_s >= best_s:
            break
    return sorted(order[:best])


def rows_ahead(
    tokens_each: float,
    num_cold: int,
    num_slots: int,
    expert_s: Callable[[int], float],
    *,
    copy_s: float,
    start_s: float = 0.0,
) -> int:
    """How many of a layer's ``num_cold`` experts to send before its router has run.

    ``tokens_each`` is what an expert will have on average. Half of what the link is expected to
    bring keeps it busy between two layers, and leaves the other half to be chosen by what the
    router says. None where many experts will have no token at all: a copy could be in vain.
    """
    if tokens_each < 1:
        return 0
    expected = [round(tokens_each)] * num_cold
    on_cpu = len(cpu_share(expected, expert_s, copy_s=copy_s, start_s=start_s))
    return min((num_cold - on_cpu + 1) // 2, max(1, 3 * num_slots // 4))


@dataclass(slots=True)
class LinkClock:
    """How much the link still has to do when a layer's routing is known.

    A model of time and no measurement, so that equal steps are divided equally, bit for bit.
    """

    backlog_s: float = 0.0

    def pass_layer(self, *, own_s: float, ahead_s: float, cpu_s: float) -> None:
        """A layer that sent ``own_s`` for itself, then ``ahead_s``; the CPU took ``cpu_s``."""
        own_end_s = self.backlog_s + own_s
        next_s = max(own_end_s, cpu_s) + GAP_S
        self.backlog_s = max(0.0, own_end_s + ahead_s - next_s)

"""Which of a layer's cold experts the CPU computes while the link brings the others: pure.

Both work at the same time, so a layer takes as long as the slower of them. The CPU takes the
experts with the fewest tokens: what it costs grows with them, while a copy costs the same whatever
the tokens. Nothing here sees what a step really took, so that equal steps are divided equally, bit
for bit; times that turn out longer must be allowed for beforehand.
"""

from collections.abc import Callable, Sequence

LEAST_TOKENS = 33  # of a step that goes this way; the kernels for decoding take up to 32

# What passes in a layer besides its experts, while the link goes on: attention, norms, router,
# launches. Measured as about a millisecond for 512 tokens.
GAP_S = 1e-3

# What a layer loses to the CPU's having a share of it, however small: Python waits for that before
# it launches the next layer's kernels, and the CPU for its next share behind them. The link has
# copies to make meanwhile, but in the end stands still as well: by 1.0 to 2.4 ms a layer, of 1,024
# and 2,048 tokens, Mixtral's and Qwen3-30B's; 0.6 where Python is fast. Predictions count it in
# launches (``prefill_prediction.TURN_LAUNCHES``); here the most common is taken for all machines.
TURN_S = 1.5e-3

# The CPU's times are taken to be so much longer. 128 experts of 2048 x 768, 83 of them cold, 32
# tokens each at 0.17 ms of the link and 0.5 of the CPU, simulated: where the CPU takes as long as
# was measured, a prompt is 1.26 times as fast as with the link alone (1.28 without this factor);
# where it takes 1.3 times as long, 1.16 (1.04), and with 1.5 times 1.03 (0.92).
CAUTION = 1.2


def cpu_share(
    counts: Sequence[int],
    expert_s: Callable[[int], float],
    *,
    copy_s: float,
    ahead_s: float = 0.0,
    start_s: float = 0.0,
    result_s: float = 0.0,
) -> list[int]:
    """Indices of ``counts`` (tokens of each expert) that the CPU computes, ascending.

    Minimises the greater of two times. The CPU's: ``start_s``, ``CAUTION`` times ``expert_s`` of
    each of its experts, and ``GAP_S`` if the link has copies to make for the next layer. The
    link's: ``copy_s`` for each of the others, ``ahead_s`` for those of the next layer, and
    ``result_s`` for what the CPU gives back. Any share of the CPU's costs ``TURN_S`` beside both:
    one that gains less is not worth having. What is still under way for this layer counts for
    neither: as much will be when the next one begins. Experts without tokens are nobody's.
    """
    order = sorted([e for e, count in enumerate(counts) if count > 0], key=counts.__getitem__)
    best_s, best = ahead_s + len(order) * copy_s, 0
    cpu_s = start_s + (GAP_S if ahead_s else 0.0)
    for taken, e in enumerate(order, start=1):
        cpu_s += CAUTION * expert_s(counts[e])
        link_s = ahead_s + result_s + (len(order) - taken) * copy_s
        end_s = TURN_S + max(cpu_s, link_s)
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
    result_s: float = 0.0,
) -> int:
    """How many of a layer's ``num_cold`` experts to send before its router has run.

    ``tokens_each`` is what an expert will have on average. Half of what the link is expected to
    bring keeps it busy between two layers, and leaves the other half to be chosen by what the
    router says. None where many experts will have no token at all: a copy could be in vain.
    """
    if tokens_each < 1:
        return 0
    expected = [round(tokens_each)] * num_cold
    share = cpu_share(expected, expert_s, copy_s=copy_s, start_s=start_s, result_s=result_s)
    return min((num_cold - len(share) + 1) // 2, max(1, 3 * num_slots // 4))

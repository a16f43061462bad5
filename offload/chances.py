"""How likely a token is to choose each expert, and how many experts some tokens choose: pure.

Shapes: L layers, E experts, N some experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload.placement import Placement
from offload.routing_law import Law

Floats = npt.NDArray[np.float64]
HALVINGS = 60


@dataclass(frozen=True, slots=True)
class LayerChances:
    """Of one layer's resident and cold experts, the chance that a token chooses it."""

    hot: tuple[float, ...]
    cold: tuple[float, ...]

    @property
    def hit_rate(self) -> float:
        """Share of a token's choices that are resident."""
        return sum(self.hot) / max(sum(self.hot) + sum(self.cold), 1e-300)

    def cold_chance(self, num_tokens: int) -> float:
        """How likely any of so many tokens chooses a cold expert at all.

        As if that share of equally likely experts were resident: a token draws without putting
        back, so all of its choices are resident less often than its hit rate's power says. Never
        more likely than cold experts are expected: whoever has any has one at least.
        """
        if not self.cold:
            return 0.0
        num_experts = len(self.hot) + len(self.cold)
        num_hot, top_k = self.hit_rate * num_experts, round(sum(self.hot) + sum(self.cold))
        drawn_K = np.arange(top_k)
        all_hot = np.prod(np.maximum(num_hot - drawn_K, 0.0) / (num_experts - drawn_K))
        return min(float(1.0 - all_hot**num_tokens), distinct(self.cold, num_tokens))


def law_chances(law: Law, num_experts: int, top_k: int) -> Floats:
    """By rank, the chance that a token which draws by ``law`` has an expert among its choices.

    Drawing distinct experts in proportion to weights is a race of exponential clocks, of which the
    first K win; each is taken to have run for the time in which K are expected.
    """
    if top_k >= num_experts:
        return np.ones(num_experts)
    weight_E = np.arange(1, num_experts + 1, dtype=np.float64) ** -law.skew
    low, high = 0.0, 1.0
    while _drawn(weight_E, high).sum() < top_k:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _drawn(weight_E, middle).sum() < top_k else (low, middle)
    return _drawn(weight_E, high)


def placed_chances(
    shares_LE: Floats, placement: Placement, moe_layers: Sequence[int], top_k: int
) -> tuple[LayerChances, ...]:
    """Of each layer that has experts, where tokens choose as ``shares_LE`` (rows sum to 1) say."""
    chance_LE = np.minimum(top_k * shares_LE, 1.0)
    found = []
    for layer in moe_layers:
        is_hot_E = np.zeros(shares_LE.shape[1], dtype=bool)
        is_hot_E[sorted(placement.resident[layer])] = True
        chance_E = chance_LE[layer]
        found.append(
            LayerChances(tuple(chance_E[is_hot_E].tolist()), tuple(chance_E[~is_hot_E].tolist()))
        )
    return tuple(found)


def blind_chances(
    chance_E: Floats, placement: Placement, moe_layers: Sequence[int], hit_rate: float
) -> tuple[LayerChances, ...]:
    """Where the placement knows no ranks: either side has some of all, scaled to ``hit_rate``."""
    found = []
    total = float(chance_E.sum())
    for layer in moe_layers:
        num_hot, size = len(placement.resident[layer]), len(chance_E)
        is_hot_E = np.zeros(size, dtype=bool)
        if num_hot:
            is_hot_E[(np.arange(num_hot) * size) // num_hot] = True
        found.append(
            LayerChances(
                _scaled(chance_E[is_hot_E], total * hit_rate),
                _scaled(chance_E[~is_hot_E], total * (1 - hit_rate)),
            )
        )
    return tuple(found)


def distinct(chances: Sequence[float], num_tokens: int) -> float:
    """How many of the experts are expected to be chosen by any of so many tokens."""
    return float((1.0 - (1.0 - np.asarray(chances, np.float64)) ** num_tokens).sum())


def token_counts(chances: Sequence[float], num_tokens: int) -> list[int]:
    """Tokens of each expert that is chosen, as expected: as many as are distinct, descending."""
    chance_N = np.sort(np.asarray(chances, np.float64))[::-1]
    number = round(distinct(chances, num_tokens))
    if number == 0:
        return []
    pairs = float(chance_N.sum()) * num_tokens
    kept_N = chance_N[:number]
    count_N = np.rint(kept_N * pairs / max(float(kept_N.sum()), 1e-300))
    counts: list[int] = np.maximum(count_N, 1).astype(np.int64).tolist()
    return counts


def _drawn(weight_E: Floats, time: float) -> Floats:
    drawn_E: Floats = -np.expm1(-weight_E * time)
    return drawn_E


def _scaled(chance_N: Floats, total: float) -> tuple[float, ...]:
    """In the same proportions, with that sum; none above 1."""
    if not len(chance_N):
        return ()
    factor = total / max(float(chance_N.sum()), 1e-300)
    return tuple(np.minimum(chance_N * factor, 1.0).tolist())

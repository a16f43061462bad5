"""A placement judged on routes that it was not made from, and how sure that judgement is.

Shapes: W held-out windows, L layers, E experts.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offload.placement import Placement
from offload.planner import place
from offload.popularity import Popularity, Profile, hit_rate
from offload.profile_pair import SHARES

Counts = npt.NDArray[np.int64]
Z = 1.959964  # of the normal distribution, 2.5 % lie above


@dataclass(frozen=True, slots=True, kw_only=True)
class HitRates:
    """Share of held-out routes that meet a resident expert when ``num_resident`` are resident.

    They are placed by the profile, without one, or by the held-out routes themselves: no placement
    does better than the last. ``low`` to ``high`` is where ``profile`` lies for texts like this
    one, at 95 %.
    """

    num_resident: int
    profile: float
    low: float
    high: float
    uniform: float
    best: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileResult:
    """A profile of the training part, judged on ``held_out_tokens`` that it never saw.

    ``held_out_LE`` are their counts. ``placement`` and ``present`` belong to the VRAM budget that
    the model was loaded with; ``by_share`` tells the same for :data:`SHARES` of all experts.
    """

    profile: Profile
    moe_layers: tuple[int, ...]
    held_out_tokens: int
    held_out_LE: Counts
    placement: Placement
    present: HitRates
    by_share: tuple[HitRates, ...]


def judge(
    profile: Profile,
    held_out_WLE: Counts,
    *,
    moe_layers: tuple[int, ...],
    num_resident: int,
    held_out_tokens: int,
) -> ProfileResult:
    """Compare placements made with and without ``profile`` on routes that it has not seen."""
    num_layers, num_experts = profile.popularity.counts_LE.shape
    held_out_LE = held_out_WLE.sum(axis=0)
    uniform, best = Popularity.uniform(num_layers, num_experts), Popularity(held_out_LE)

    def rates(count: int) -> HitRates:
        placement = place(profile.popularity, moe_layers, count)
        low, high = rate_interval(*_by_window(placement, held_out_WLE))
        return HitRates(
            num_resident=count,
            profile=hit_rate(placement, held_out_LE),
            low=low,
            high=high,
            uniform=hit_rate(place(uniform, moe_layers, count), held_out_LE),
            best=hit_rate(place(best, moe_layers, count), held_out_LE),
        )

    total = len(moe_layers) * num_experts
    return ProfileResult(
        profile=profile,
        moe_layers=moe_layers,
        held_out_tokens=held_out_tokens,
        held_out_LE=held_out_LE,
        placement=place(profile.popularity, moe_layers, num_resident),
        present=rates(num_resident),
        by_share=tuple(rates(round(total * share)) for share in SHARES),
    )


def rate_interval(hits_W: npt.ArrayLike, totals_W: npt.ArrayLike) -> tuple[float, float]:
    """Where the rate of hits lies, at 95 %, by how the windows differ; 0 to 1 of fewer than two.

    Routes of one window are alike, so they are not counted one by one: a binomial interval would
    be a tenth as wide. With some ten windows Student's distribution matters (2.26 against 1.96).
    """
    hits_W, totals_W = np.asarray(hits_W, float), np.asarray(totals_W, float)
    kept = totals_W > 0
    hits_W, totals_W = hits_W[kept], totals_W[kept]
    num = len(hits_W)
    if num < 2:
        return 0.0, 1.0
    rate = hits_W.sum() / totals_W.sum()
    squares = float(((hits_W - rate * totals_W) ** 2).sum())
    error = math.sqrt(num / (num - 1) * squares) / totals_W.sum()
    reach = student(num - 1) * error
    return max(0.0, float(rate - reach)), min(1.0, float(rate + reach))


def student(freedom: int) -> float:
    """What 2.5 % of Student's distribution lie above, to 1 %."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def _by_window(placement: Placement, counts_WLE: Counts) -> tuple[Counts, Counts]:
    """Of each window, the routes that meet a resident expert, and all."""
    is_resident_LE = np.zeros(counts_WLE.shape[1:], dtype=bool)
    for layer, experts in enumerate(placement.resident):
        is_resident_LE[layer, sorted(experts)] = True
    hits_W: Counts = counts_WLE[:, is_resident_LE].sum(axis=1)
    totals_W: Counts = counts_WLE.sum(axis=(1, 2))
    return hits_W, totals_W

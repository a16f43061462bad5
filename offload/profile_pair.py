"""Two profiles of one model: how alike they are, what one's placement is worth on the other's text,
and both as one.

Shapes: M layers with experts, E experts.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from fiddler.errors import ProfileError
from offload.planner import place
from offload.popularity import Popularity, Profile, hit_rate

SHARES = (0.125, 0.25, 0.5)  # of all experts resident


@dataclass(frozen=True, slots=True)
class LayerLikeness:
    """Of one layer: ``overlap`` is the share of either's busiest quarter that is in the other's.

    ``divergence_bits`` is Jensen and Shannon's, between the shares: 0 equal, 1 nothing in common.
    """

    layer: int
    overlap: float
    divergence_bits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Share of the second profile's routes that meet one of ``num_resident`` resident experts.

    Placed by the first, by the second itself (nothing does better), and without a profile.
    """

    num_resident: int
    first: float
    second: float
    uniform: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """How two profiles differ; ``transfers`` are for :data:`SHARES` of all experts."""

    layers: tuple[LayerLikeness, ...]
    transfers: tuple[Transfer, ...]


def compare(first: Profile, second: Profile) -> Comparison:
    """Raises :class:`ProfileError` for profiles of different models."""
    _check_one_model(first, second)
    counts_LE = first.popularity.counts_LE + second.popularity.counts_LE
    moe_layers = tuple(np.flatnonzero(counts_LE.any(axis=1)).tolist())
    if not moe_layers:
        raise ProfileError("neither profile has counted anything", hint="profile a longer text")
    total = len(moe_layers) * counts_LE.shape[1]
    return Comparison(
        layers=_layers(first.popularity, second.popularity, moe_layers),
        transfers=tuple(
            _transfer(first.popularity, second.popularity, moe_layers, round(total * share))
            for share in SHARES
        ),
    )


def merge(first: Profile, second: Profile) -> Profile:
    """Both profiles' counts added up: as if one had been made of both texts.

    Raises :class:`ProfileError` for profiles of different models, and for two of one text, whose
    routes would count twice. Weights of different revisions are taken to route alike; the result
    then names none.
    """
    _check_one_model(first, second)
    if first.corpus_sha256 == second.corpus_sha256:
        raise ProfileError(
            "both profiles are of the same text, whose routes would count twice",
            hint="merge profiles of different texts",
        )
    hashes = sorted((first.corpus_sha256, second.corpus_sha256))
    counts_LE = first.popularity.counts_LE + second.popularity.counts_LE
    return Profile(
        model=first.model,
        architecture=first.architecture or second.architecture,
        revision=first.revision if first.revision == second.revision else None,
        corpus_sha256=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        num_tokens=first.num_tokens + second.num_tokens,
        popularity=Popularity(counts_LE),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def divergence_bits(p_ME: npt.NDArray[np.float64], q_ME: npt.NDArray[np.float64]) -> list[float]:
    """Jensen-Shannon divergence of each row of two tables of positive shares."""
    mean_ME = (p_ME + q_ME) / 2
    bits_ME = p_ME * np.log2(p_ME / mean_ME) + q_ME * np.log2(q_ME / mean_ME)
    return [float(bits) for bits in np.maximum(bits_ME.sum(axis=1) / 2, 0.0)]


def _check_one_model(first: Profile, second: Profile) -> None:
    if first.is_of(second.model, second.architecture, second.popularity.counts_LE.shape):
        return
    raise ProfileError(
        f"the profiles are of different models: {first.subject} and {second.subject}",
        hint="give two profiles of one model",
    )


def _layers(
    first: Popularity, second: Popularity, moe_layers: tuple[int, ...]
) -> tuple[LayerLikeness, ...]:
    p_ME, q_ME = (popularity.shares()[list(moe_layers)] for popularity in (first, second))
    busiest = max(1, p_ME.shape[1] // 4)
    tops = [np.argsort(-shares, axis=1, kind="stable")[:, :busiest] for shares in (p_ME, q_ME)]
    overlaps = [
        len(set(p) & set(q)) / busiest for p, q in zip(*map(np.ndarray.tolist, tops), strict=True)
    ]
    return tuple(map(LayerLikeness, moe_layers, overlaps, divergence_bits(p_ME, q_ME)))


def _transfer(
    first: Popularity, second: Popularity, moe_layers: tuple[int, ...], num_resident: int
) -> Transfer:
    nothing = Popularity.uniform(*first.counts_LE.shape)
    rates = {
        name: hit_rate(place(popularity, moe_layers, num_resident), second.counts_LE)
        for name, popularity in (("first", first), ("second", second), ("uniform", nothing))
    }
    return Transfer(num_resident=num_resident, **rates)

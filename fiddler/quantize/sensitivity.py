"""Which layers get more bits within a given size: an exact choice from measured losses. Pure.

A layer's experts are of one kind, for they lie side by side in rows of one size; so bits are dealt
out by layers. What a layer's kinds cost and lose is known, and no choice that fits loses less.

L layers, K kinds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from cpu_kernels.weight_kind import GROUPS, WeightKind
from fiddler.models.config import ModelConfig
from fiddler.models.manifest import packed_shape


class Option(NamedTuple):
    """What a layer takes, and loses, in one of its kinds."""

    nbytes: int
    loss: float


def ladder(config: ModelConfig, least: WeightKind) -> tuple[WeightKind, ...]:
    """``least`` and what a layer may have instead: smaller groups, then 8 bits; ascending.

    Groups divide the experts' sides; zero points and scales are those of ``least``.
    """
    sides = config.hidden_size, config.expert_size
    groups = [g for g in reversed(GROUPS) if not any(side % g for side in sides)]
    smaller = [replace(least, group=g) for g in groups if g < least.group]
    wider = [replace(least, codes="int8", group=g) for g in groups[:1]] if least.bits == 4 else []
    return (least, *smaller, *wider)


def share_of(config: ModelConfig, kind: WeightKind) -> float:
    """Of an expert in bfloat16, what it takes in ``kind``."""
    return packed_shape(config, kind).expert_bytes / (2 * config.expert_numel)


def choose_kinds(
    config: ModelConfig,
    kinds: Sequence[WeightKind],
    losses: Mapping[int, Sequence[float]],
    share: float,
) -> list[WeightKind]:
    """Each layer's kind, so that all experts take at most ``share`` of bfloat16.

    ``kinds`` are those that ``losses`` of each layer are of, the smallest first, which fits. A
    layer without experts has that one too.
    """
    sizes = [config.num_experts * packed_shape(config, kind).expert_bytes for kind in kinds]
    options_LK = [[*map(Option, sizes, losses_K)] for losses_K in losses.values()]
    budget = int(share * 2 * config.expert_numel * config.num_experts * len(losses))
    chosen = choose(options_LK, budget)
    assert chosen is not None, "the first kind was to fit"
    numbers = dict(zip(losses, chosen, strict=True))
    return [kinds[numbers.get(layer, 0)] for layer in range(config.num_layers)]


def choose(options_LK: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """Each layer's option, with the least sum of losses within ``budget`` bytes; None: none fits.

    Exact. Of equal losses the smaller size. Layers are added one after the other, and of all ways
    to choose for those so far only such are kept that no other one beats in both size and loss:
    sizes repeat, so for 96 layers and 4 kinds they are some thousands.
    """
    # of the layers so far: (bytes, loss, option of the last one, the way that it continues)
    ways: list[_Way] = [_Way(0, 0.0, -1, None)]
    for options in options_LK:
        longer = [
            _Way(way.nbytes + option.nbytes, way.loss + option.loss, number, way)
            for way in ways
            for number, option in enumerate(options)
            if way.nbytes + option.nbytes <= budget
        ]
        ways = _unbeaten(longer)
    if not ways:
        return None
    chosen: list[int] = []
    way = ways[-1]
    while way.before is not None:
        chosen.append(way.option)
        way = way.before
    return chosen[::-1]


class _Way(NamedTuple):
    nbytes: int
    loss: float
    option: int
    before: "_Way | None"


def _unbeaten(ways: list[_Way]) -> list[_Way]:
    """Ascending in size, descending in loss."""
    kept: list[_Way] = []
    for way in sorted(ways, key=lambda way: way[:2]):
        if not kept or way.loss < kept[-1].loss:
            kept.append(way)
    return kept

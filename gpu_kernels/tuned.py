"""Launch configurations found by measuring: plain data, chosen by a pure function.

``TABLE[kernel][family]`` lists (limits, configuration): the first one counts whose limits are all
kept, where ``{"rows": 32}`` means at most 32 rows. A family without a fitting entry takes that of
the next older one; the oldest one's list ends with limits that everything keeps.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpu_kernels.device import FAMILIES

Limits = Mapping[str, int]
Config = Mapping[str, int]

TABLE: dict[str, dict[str, list[tuple[Limits, Config]]]] = {
    "embedding": {"sm80": [({}, {"BLOCK_H": 1024, "num_warps": 4})]},
    "router": {"sm80": [({"experts": 256}, {"num_warps": 1}), ({}, {"num_warps": 2})]},
    "sampling_tile": {"sm80": [({}, {"num_warps": 4})]},
    "sampling_finish": {"sm80": [({}, {"num_warps": 8})]},
}


def choose(kernel: str, family: str, **sizes: int) -> Config:
    """Return the keyword arguments with which ``kernel`` is launched on ``family``."""
    names = list(FAMILIES.values())
    by_family = TABLE[kernel]
    for candidate in reversed(names[: names.index(family) + 1]):
        for limits, config in by_family.get(candidate, ()):
            if all(sizes[name] <= largest for name, largest in limits.items()):
                return config
    raise AssertionError(f"the oldest family of {kernel} lacks an entry without limits")
